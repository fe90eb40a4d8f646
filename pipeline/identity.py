"""Run identity: a hash of the settings that can change a result, and of nothing else."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_jsonable_python

from pipeline.settings import Settings, setting_fields

# 12 hex digits are 48 bits: by chance, two of 10,000 runs share an id with probability 2e-7.
ID_LENGTH = 12
_PLAIN = frozenset({str, int, float, bool, type(None)})
RETIRED_SETTINGS = frozenset({"preset"})
"""Runtime settings that older records hold and that no class has any more."""


def science_fields(value: Any) -> Any:
    """Return the JSON-able content of a configuration without its runtime fields, at every depth.

    A field at its default is included like any other, None too: a changed default is a changed id.
    Only those that were added later (`Added`) are left out at their default.
    """
    return _content(value, runtime=False)


def dump_settings(settings: Settings) -> dict[str, Any]:
    """Return all settings as JSON-able values, as records and run files hold them."""
    content: dict[str, Any] = _content(settings, runtime=True)
    return content


def _content(value: Any, *, runtime: bool) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Settings):
        return _content_of_settings(value, runtime=runtime)
    if isinstance(value, Mapping):
        return {str(key): _content(item, runtime=runtime) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_content(item, runtime=runtime) for item in value]
    if isinstance(value, set | frozenset):
        items = [_content(item, runtime=runtime) for item in value]
        # Sets have no order; JSON text gives one that is the same in every process.
        return sorted(items, key=lambda item: json.dumps(item, sort_keys=True))
    return to_jsonable_python(value)


def _content_of_settings(settings: Settings, *, runtime: bool) -> dict[str, Any]:
    content = {}
    unused = settings.unused_settings()
    for field in setting_fields(type(settings)).values():
        value = getattr(settings, field.name)
        if field.name in unused or (field.runtime and not runtime):
            continue
        if field.added and value == field.default and not runtime:
            continue
        # A renamed setting keeps its old name and value here, or every finished run would get
        # another id.
        recorded = value if field.former is None else field.former.to_record(value)
        # Most values are plain, and plans of thousands of runs have millions of them.
        plain = type(recorded) in _PLAIN
        content[field.record_name] = recorded if plain else _content(recorded, runtime=runtime)
    return content


def runtime_names(cls: type[Settings], prefix: str = "") -> set[str]:
    """Return the dotted names of the fields that cannot change a result, nested ones too."""
    names: set[str] = set()
    for field in setting_fields(cls).values():
        if field.runtime:
            names.add(f"{prefix}{field.record_name}")
        elif field.nested is not None:
            names |= runtime_names(field.nested, f"{prefix}{field.record_name}.")
    return names


def run_id(stage: str, config: Settings, upstream: Mapping[str, str]) -> str:
    """Return the identity of a run, 12 hex digits.

    It covers the stage, the science fields, and the ids of the runs that fill its roles.
    """
    # Sorted: the order of fields in a class, or of roles in a file, makes no other run.
    payload = json.dumps(
        [stage, science_fields(config), dict(upstream)], sort_keys=True, allow_nan=True
    )
    return hashlib.sha256(payload.encode()).hexdigest()[:ID_LENGTH]
