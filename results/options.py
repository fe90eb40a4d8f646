"""Options of `tables` that do not go together."""

from typing import Any

from results import spec

INSTEAD = ("out", "explain", "against", "publish")
WITH = {"table": ("out", "against"), "filled": ("out",), "format": ("against",)}


class OptionError(ValueError):
    """Options that exclude each other, or a name that does not exist."""


def check_table_options(**given: Any) -> None:
    """Raise OptionError; `given`: the values of the options by name, None, empty or False where not given.

    Of those that do something instead of printing, one may be given; each of the others says which of them heed it.
    """
    chosen = [name for name in INSTEAD if given.get(name) is not None]
    if len(chosen) > 1:
        raise OptionError(f"--{' and --'.join(chosen)} do different things; give one of them")
    for option, heeding in WITH.items():
        if given.get(option) and chosen and chosen[0] not in heeding:
            raise OptionError(f"--{option} says nothing with --{chosen[0]}; leave it out")
    asked = [("--table", name) for name in given.get("table") or ()]
    asked += [("--explain", given["explain"][0])] if given.get("explain") else []
    for option, name in asked:
        if name not in spec.table_names():
            raise OptionError(f"{option} {name}: expected one of {', '.join(spec.table_names())}")
