"""Settings classes, the marks of their fields, and how the marks are read.

A settings class is a frozen dataclass derived from `Settings`. Limits stand in the annotation
(`Annotated[int, Field(ge=1)]`), and so do the marks `Runtime[...]`, `RequiredAtRun[...]` and
`Internal[...]`. Nothing is checked when Python code builds an instance; only
`pipeline.reading.validate_model` does, for what a YAML file says.
"""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field

T = TypeVar("T")


class Mark(enum.Enum):
    """A kind of field other than a setting that can change a result."""

    RUNTIME = enum.auto()
    REQUIRED_AT_RUN = enum.auto()
    INTERNAL = enum.auto()
    ADDED = enum.auto()
    INPUT = enum.auto()


@dataclass(frozen=True)
class FormerName:
    """Mark of a renamed field: YAML may still use the old name; run ids and records keep it.

    `values` are pairs of a value and what it was called under the old name, if that differs.
    """

    name: str
    values: tuple[tuple[Any, Any], ...] = ()

    def to_record(self, value: Any) -> Any:
        """Return the value as it was called under the old name."""
        return next((old for new, old in self.values if new == value), value)

    def from_record(self, value: Any) -> Any:
        """Return the value that one under the old name stands for."""
        return next((new for new, old in self.values if old == value), value)


Runtime = Annotated[T, Mark.RUNTIME]
"""Cannot change a result (workers, paths, log intervals), so it is not part of the run id."""
InputPath = Annotated[T, Mark.RUNTIME, Mark.INPUT]
"""A file or folder from outside that the run reads (`pipeline/inputs.py`)."""
RequiredAtRun = Annotated[T, Mark.RUNTIME, Mark.INPUT, Mark.REQUIRED_AT_RUN]
"""An input path that may be None in a plan; a run with None refuses to start."""
Internal = Annotated[T, Mark.INTERNAL]
"""Given by code only (the number of classes of the data): refused in YAML,
and not part of the run id.
"""
Added = Annotated[T, Mark.ADDED]
"""Added after runs were made without it: at its default, which is what these did, it is not part of
the run id.
"""
Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of every settings class: YAML with a key that the class does not have is refused."""

    # pydantic reads its options for a plain dataclass here. Defaults are validated too: one that
    # its own limits refuse is a mistake in the class, and shows in the first test.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "validate_default": True}

    def unused_settings(self) -> frozenset[str]:
        """Return fields without effect at the values of the others; they are no part of the run id.

        They have to be at their defaults: the class refuses other values.
        """
        return frozenset()


@dataclass(frozen=True)
class SettingField:
    """A field of a settings class; `nested` is the settings class that it holds, or may hold.

    `former` is its name in run ids and in records on disk, if that is another one.
    """

    name: str
    former: FormerName | None
    marks: frozenset[Mark]
    nested: type[Settings] | None
    default: Any

    @cached_property
    def record_name(self) -> str:
        """Return its name in run ids and in records on disk."""
        return self.name if self.former is None else self.former.name

    @cached_property
    def runtime(self) -> bool:
        """Whether the field cannot change a result."""
        return Mark.RUNTIME in self.marks

    @cached_property
    def added(self) -> bool:
        """Whether the field was added later, and stays out of run ids at its default."""
        return Mark.ADDED in self.marks


def setting_fields(cls: type[Settings]) -> dict[str, SettingField]:
    """Return the fields that a YAML file may set, by name."""
    # mypy does not accept a dataclass type as hashable, which `cache` requires.
    key: Any = cls
    return _read_fields(key)


@cache
def _read_fields(cls: type[Settings]) -> dict[str, SettingField]:
    # Annotations may be text; with `include_extras` the marks in `Annotated` are kept.
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        metadata = getattr(hints[field.name], "__metadata__", ())
        marks = frozenset(mark for mark in metadata if isinstance(mark, Mark))
        # Left out, so neither ids and records nor lists of valid keys show them.
        if Mark.INTERNAL not in marks:
            former = next((mark for mark in metadata if isinstance(mark, FormerName)), None)
            nested = _nested(hints[field.name])
            found[field.name] = SettingField(field.name, former, marks, nested, _default(field))
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _nested(hint: Any) -> type[Settings] | None:
    """Return the settings class in an annotation: `X`, `X | None`, or either with marks."""
    # The marks themselves are of no interest here, only the annotated type.
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    for option in (hint, *typing.get_args(hint)):
        if isinstance(option, type) and issubclass(option, Settings):
            return option
    return None


def use_current_names(cls: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with former names of fields replaced, nested ones too.

    If both names are given, the later one counts.
    """
    return _rename(cls, values, to_record=False)


def use_record_names(cls: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values under the names that records have, nested ones too."""
    return _rename(cls, values, to_record=True)


def _rename(cls: type[Settings], values: Mapping[str, Any], *, to_record: bool) -> dict[str, Any]:
    # Found by either name: files may have been written before or after a renaming.
    fields = {
        name: field
        for field in setting_fields(cls).values()
        for name in (field.name, field.record_name)
    }
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        field = fields.get(key)
        if field is None:
            renamed[key] = value  # whoever checks the values names the unknown key
            continue
        if field.nested is not None and isinstance(value, Mapping):
            value = _rename(field.nested, value, to_record=to_record)
        # A value that is there under the wanted name already means what it says.
        if field.former is not None and (key == field.name) == to_record:
            former = field.former
            value = former.to_record(value) if to_record else former.from_record(value)
        renamed[field.record_name if to_record else field.name] = value
    return renamed
