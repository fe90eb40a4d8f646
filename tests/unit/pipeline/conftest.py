"""Stages and a reproduction small enough to read."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.settings import RequiredAtRun, Runtime, Settings
from pipeline.spec import Resources, StageConfig, StageSpec


@dataclass(frozen=True, kw_only=True)
class Optimizer(Settings):
    """A nested part of a configuration."""

    lr: float = 1e-3
    log_every: Runtime[int] = 10


@dataclass(frozen=True, kw_only=True)
class DataConfig(StageConfig):
    """A data set."""

    dataset: str = "digits"
    train_dir: RequiredAtRun[Path | None] = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StageConfig):
    """A training."""

    epochs: int = 10
    drop: float | None = None
    optimizer: Optimizer = Optimizer()
    workers: Runtime[int] = 4


@pytest.fixture
def stages() -> dict[str, StageSpec]:
    """Three kinds of stage: data, train (needs data), test (needs data, and perhaps a train)."""
    return {
        "data": StageSpec("data", DataConfig, "x:run", resources=Resources(gpu=False)),
        "train": StageSpec(
            "train", TrainConfig, "x:run", {"data": "data"}, Resources(ranks_per_node=8)
        ),
        "test": StageSpec("test", TrainConfig, "x:run", {"data": "data", "weights": "train?"}),
    }


@pytest.fixture
def text() -> str:
    """A reproduction whose runs are written in an order in which they cannot run."""
    return """
name: small
runs:
  knn: {stage: test, needs: {data: digits, weights: main}}
  main: {stage: train, needs: {data: digits}, epochs: 3, resources: {nodes: 2}}
  digits: {stage: data}
"""
