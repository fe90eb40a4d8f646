"""Options of `tables` that do not go together."""

from collections.abc import Sequence
from typing import Any

from results import spec


class OptionError(ValueError):
    """Options that exclude each other, or a table that does not exist."""


def check(tables: Sequence[str] | None, filled: bool, **given: Any) -> None:
    """Raise OptionError; `given`: the values of --out, --explain, --against and --publish, None where not given."""
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise OptionError(f"--{' and --'.join(chosen)} do different things; give one of them")
    if filled and chosen not in ([], ["out"]):
        raise OptionError(f"--filled says nothing with --{chosen[0]}; leave it out")
    if tables and chosen in (["explain"], ["publish"]):
        raise OptionError(f"--table says nothing with --{chosen[0]}; leave it out")
    asked = [("--table", name) for name in tables or ()]
    asked += [("--explain", given["explain"][0])] if given.get("explain") else []
    for option, name in asked:
        if name not in spec.names():
            raise OptionError(f"{option} {name}: expected one of {', '.join(spec.names())}")
