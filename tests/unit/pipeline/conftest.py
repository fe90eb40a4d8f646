"""Stages and a reproduction small enough to read."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from pipeline.spec import Resources, Runtime, StageConfig, StageSpec


class Optimizer(BaseModel):
    """A nested part of a configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    lr: float = 1e-3
    log_every: int = Runtime(10)


class DataConfig(StageConfig):
    """A data set."""

    dataset: str = "digits"
    train_dir: Path | None = Runtime(None, required_at_run=True)


class TrainConfig(StageConfig):
    """A training."""

    epochs: int = 10
    drop: float | None = None
    optimizer: Optimizer = Optimizer()
    workers: int = Runtime(4)


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
