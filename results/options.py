"""Which options of `tables` go together."""

from typing import Any

from results import spec

# Options that do something instead of printing tables.
ACTIONS = ("out", "explain", "against", "publish")

# The other options, and the actions that heed them.
COMBINES_WITH = {"table": ("out", "against"), "filled": ("out",), "format": ("against",)}


class OptionError(ValueError):
    """Options exclude each other, or a name does not exist."""


def check_table_options(**given: Any) -> None:
    """Raise OptionError if options cannot be combined or a table does not exist.

    `given` has the values of the options by name; None, empty or False if not given.
    """
    actions = [name for name in ACTIONS if given.get(name) is not None]
    if len(actions) > 1:
        raise OptionError(f"--{' and --'.join(actions)} cannot be combined; give one of them")
    # An option without effect is refused: silently ignored, it would seem to have worked.
    for option, heeding in COMBINES_WITH.items():
        if given.get(option) and actions and actions[0] not in heeding:
            raise OptionError(f"--{option} cannot be combined with --{actions[0]}")
    asked = [("--table", name) for name in given.get("table") or ()]
    if given.get("explain"):
        asked.append(("--explain", given["explain"][0]))
    for option, name in asked:
        if name not in spec.table_names():
            raise OptionError(f"{option} {name}: expected one of {', '.join(spec.table_names())}")
