"""Run identity: a hash of what can change a number, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

ID_LENGTH = 12


def marked(info: FieldInfo, mark: str) -> bool:
    """Whether a field carries a mark ("runtime", "required_at_run") in its `json_schema_extra`."""
    return isinstance(info.json_schema_extra, dict) and bool(info.json_schema_extra.get(mark))


def science(value: Any) -> Any:
    """JSON-able content of a configuration without its runtime fields, at every depth.

    A field at its default is included like any other, None too: a changed default is a changed id.
    """
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        kept = [name for name, info in fields.items() if not marked(info, "runtime")]
        return {name: science(getattr(value, name)) for name in kept}
    if isinstance(value, Mapping):
        return {str(key): science(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [science(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(
            (science(item) for item in value), key=lambda item: json.dumps(item, sort_keys=True)
        )
    return to_jsonable_python(value)


def runtime_names(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of the fields of a configuration that cannot change a number, nested ones too."""
    names: set[str] = set()
    for name, info in model.model_fields.items():
        if marked(info, "runtime"):
            names.add(f"{prefix}{name}")
        elif isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names |= runtime_names(info.annotation, f"{prefix}{name}.")
    return names


def run_id(stage: str, config: BaseModel, upstream: Mapping[str, str]) -> str:
    """Identity of a run, 12 hex digits: stage, science fields, and the run ids that fill its roles."""
    payload = json.dumps([stage, science(config), dict(upstream)], sort_keys=True, allow_nan=True)
    return hashlib.sha256(payload.encode()).hexdigest()[:ID_LENGTH]
