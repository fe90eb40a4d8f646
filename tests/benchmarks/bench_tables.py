"""CPU seconds of all ten tables from 2,000 rows, against importing torch."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_cli import cpu_seconds

from pipeline.manifest import ManifestEntry, record_entry
from results.schema import ResultRow
from results.store import write_rows

KINDS = (
    ("linear", "imagenet1k", "top1", "last4_cls, epoch {}"),
    ("knn", "imagenet1k", "top1", "cls, k={}, T=0.07"),
    ("finetune", "imagenet1k", "top1", "epoch {}"),
    ("finetune", "cifar10", "top1", "epoch {}"),
    ("logistic", "imagenet1k", "top1", "1% of labels, lambda={}"),
    ("coco_detection", "coco2017", "box AP", "epoch {}"),
    ("ade20k_segmentation", "ade20k", "mIoU", "step {}"),
    ("davis_segmentation", "davis2017", "J&F", "n={}"),
)
PRETRAININGS = (
    ("vit_s16", 100),
    ("vit_s16", 300),
    ("vit_s16", 800),
    ("vit_b16", 400),
    ("vit_l16", 250),
)
ROWS = 50


def rows(
    run_id: str, seed: int, arch: str, epochs: int, kind: tuple[str, str, str, str]
) -> Iterator[ResultRow]:
    """The rows of one run."""
    stage, dataset, metric, setting = kind
    for i in range(ROWS):
        yield ResultRow(
            run_id,
            "mugs",
            arch,
            epochs,
            stage,
            dataset,
            setting.format(i),
            metric,
            50 + (i * 7 + seed) % 40,
            "%",
            seed,
        )


def fill(root: Path) -> int:
    """Finished runs of every kind for every pretraining; returns how many rows they have."""
    count = 0
    for number, (arch, epochs) in enumerate(PRETRAININGS):
        for index, kind in enumerate(KINDS):
            run_id = f"{number:06d}{index:06d}"
            folder = root / kind[0] / f"run-{run_id}"
            folder.mkdir(parents=True)
            mine = list(rows(run_id, 0, arch, epochs, kind))
            write_rows(folder / "rows.csv", mine)
            path = (folder / "rows.csv").relative_to(root).as_posix()
            record_entry(root, ManifestEntry(stage=kind[0], name="run", run_id=run_id, rows=path))
            count += len(mine)
    return count


def run() -> list[dict[str, Any]]:
    """Rows {name, ours, baseline, ratio, unit, note}; ratio is baseline / ours."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "MUGS_RUN_ROOT": folder}
        count = fill(Path(folder))
        ours = cpu_seconds([sys.executable, "run_stage.py", "tables"], env, repeats=3)
    torch = cpu_seconds([sys.executable, "-c", "import torch"], dict(os.environ), repeats=3)
    return [
        {
            "name": "tables_cpu_s",
            "ours": ours,
            "baseline": torch,
            "ratio": torch / ours,
            "unit": "s",
            "note": f"all tables from {count} rows; baseline: python -c 'import torch'",
        }
    ]
