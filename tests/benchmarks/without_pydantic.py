"""Import the configuration classes where pydantic is not installed, as on a bare GPU machine.

They are frozen dataclasses; pydantic only adds checks of what a user writes, which a benchmark does
not need. Importing this module puts a stand-in in its place if there is no pydantic.
"""

import importlib.util
import sys
from types import ModuleType


def describe(*constraints: object, **options: object) -> None:
    """Take the place of `pydantic.Field`: constraints that nothing checks."""


if importlib.util.find_spec("pydantic") is None:
    stand_in = ModuleType("pydantic")
    stand_in.Field = describe
    for number in ("PositiveInt", "NonNegativeInt"):
        setattr(stand_in, number, int)
    for number in ("PositiveFloat", "NonNegativeFloat"):
        setattr(stand_in, number, float)
    sys.modules["pydantic"] = stand_in
