"""From the configuration of a stage to that of the engine."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.spec import StageConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)


def same_named(target: type[Config], cfg: StageConfig, **given: Any) -> Config:
    """What is given, and every other field of `target` as the stage's configuration has it under the same name."""
    return target(
        **given, **{f.name: getattr(cfg, f.name) for f in fields(target) if f.name not in given}
    )
