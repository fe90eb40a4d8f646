"""The runs of a reproduction, planned with the stages there are."""

from collections.abc import Sequence

from pipeline import config
from pipeline.plan import build_plan
from pipeline.spec import StageRun
from stages import STAGES


def all_runs(name_or_path: str, overrides: Sequence[str] | None = None) -> list[StageRun]:
    """Every run of a reproduction, each after those it needs. Raises ConfigError naming what is wrong."""
    return build_plan(config.load(name_or_path, STAGES, overrides or ()))
