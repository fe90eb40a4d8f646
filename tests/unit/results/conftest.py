"""Rows, and a run root made of them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.manifest import ManifestEntry, record_entry
from results.schema import Result, ResultRow
from results.store import write_rows

PRETRAIN = {
    "arch": "vit_s16",
    "epochs": 100,
    "precision": "fp32",
    "seed": 0,
    "threads": 14,
    "mugs": {"loss_weights": [1.0, 1.0, 1.0], "drop_path": 0.1},
    "views": {"weak_prob": 0.5, "num_small": 10},
}


@pytest.fixture
def row() -> ResultRow:
    """k-NN of the 800-epoch ViT-S/16."""
    return ResultRow(
        "abc",
        "mugs",
        "vit_s16",
        800,
        "knn",
        "imagenet1k",
        "cls, k=20, T=0.05",
        "top1",
        75.1,
        "%",
        0,
    )


@pytest.fixture
def results(row: ResultRow) -> Callable[..., list[Result]]:
    """Results of the row with some fields changed, one per keyword set."""
    return lambda *changes: [
        Result(replace(row, **change), f"rows.csv, line {i}") for i, change in enumerate(changes, 2)
    ]


@pytest.fixture
def pretraining() -> dict[str, Any]:
    """Configuration of the 100-epoch ViT-S/16, in part."""
    return json.loads(json.dumps(PRETRAIN))  # type: ignore[no-any-return]


class RunRoot:
    """Writes manifest entries and rows as finished runs do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, run_id: str, stage: str, rows: Sequence[ResultRow] = (), **entry: Any) -> Path:
        """Record a finished run; returns the file of its rows."""
        folder = self.path / stage / f"{stage}-{run_id}"
        folder.mkdir(parents=True)
        if rows:
            write_rows(folder / "rows.csv", rows)
            entry["rows"] = f"{stage}/{stage}-{run_id}/rows.csv"
        record_entry(self.path, ManifestEntry(stage=stage, name=stage, run_id=run_id, **entry))
        return folder / "rows.csv"


@pytest.fixture
def run_root(tmp_path: Path) -> RunRoot:
    """An empty run root."""
    return RunRoot(tmp_path / "runs")
