"""Stands in for pydantic where it is not installed, as on a bare GPU machine.

Configuration classes are frozen dataclasses; pydantic only adds checks of what a user writes, which
a benchmark does not need. A file, so that the loader's workers find it as well.
"""


def Field(*constraints: object, **options: object) -> None:
    """Constraints that nothing checks."""


def AfterValidator(check: object) -> None:
    """A check that nothing runs."""


PositiveInt = int
NonNegativeInt = int
PositiveFloat = float
NonNegativeFloat = float
