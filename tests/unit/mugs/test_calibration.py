"""Epoch means beside the released ones: the table, a tiny run,
and the same after a restart in mid-epoch.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from step_cases import SMALLEST

from mugs.data.sources.base import FolderSource
from mugs.data.views.config import ViewRecipe
from mugs.engine.calibration import EpochMeans
from mugs.engine.step import StepResult
from mugs.methods.calibration import load_calibration_targets
from mugs.methods.mugs import Mugs
from mugs.pretrain.config import TrainConfig
from mugs.pretrain.train import pretrain

TARGETS = {
    0: {"total": 3.0, "instance": 3.0, "group": 3.0, "local_group": 3.0},
    2: {"total": 2.0, "instance": 2.0, "no_such": 1.0},
}


def test_the_table() -> None:
    assert load_calibration_targets(None) == {}
    assert load_calibration_targets("s100")[0] == {
        "total": 9.0208,
        "instance": 9.5816,
        "group": 7.8942,
        "local_group": 9.5867,
    }
    assert (
        load_calibration_targets("l250")[6]["group"] == 5.4695
        and load_calibration_targets("s300")[6]["total"] == 6.9055
    )
    for run in ("s100", "s300", "l250"):
        assert list(load_calibration_targets(run)) == list(range(7))
        for epoch in load_calibration_targets(run).values():
            parts = sum(epoch[name] for name in ("instance", "group", "local_group"))
            assert epoch["total"] == pytest.approx(parts / 3, abs=2e-4)
    with pytest.raises(ValueError, match="b400"):
        load_calibration_targets("b400")


def train(folder: Path, source: FolderSource) -> list[dict[str, Any]]:
    """Nine steps in three epochs; the lines of metrics.jsonl."""
    torch.set_num_threads(1)
    config = TrainConfig(
        epochs=3,
        batch_size=4,
        base_lr=1e-2,
        warmup_epochs=1,
        steps_per_epoch=3,
        views=ViewRecipe(large_size=32, small_size=16, num_small=1),
        checkpoint_steps=2,
        log_steps=1,
        calibration="s300",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mugs.pretrain.train.load_calibration_targets", {"s300": TARGETS}.__getitem__)
        pretrain(Mugs(SMALLEST), source, config, folder, torch.device("cpu"))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_means_of_a_run(
    digits: FolderSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    lines = train(tmp_path, digits)
    found = {line["epoch"]: line["calibration"] for line in lines if "calibration" in line}
    assert set(found) == {0, 2}
    losses = [line for line in lines if "loss" in line]
    for name in ("total", "instance", "group", "local_group"):
        ours = sum(line["loss" if name == "total" else f"loss_{name}"] for line in losses[:3]) / 3
        assert found[0]["ours"][name] == pytest.approx(ours)
        assert found[0]["deviation_percent"][name] == pytest.approx(100 * (ours - 3) / 3)
    assert found[0]["target"] == TARGETS[0] and found[0]["partial"] is False
    assert set(found[2]["ours"]) == {"total", "instance"}
    said = [record.message for record in caplog.records if "calibration, epoch" in record.message]
    assert (
        len(said) == 2
        and "epoch 0: total " in said[0]
        and "(target 3.0000, " in said[0]
        and "only" not in said[0]
    )


def test_a_restart_in_mid_epoch_gives_the_same(digits: FolderSource, tmp_path: Path) -> None:
    straight = [line for line in train(tmp_path, digits) if "calibration" in line]
    (tmp_path / "metrics.jsonl").unlink()
    shutil.rmtree(
        tmp_path / "checkpoints" / "step_00000009"
    )  # as if killed in the last epoch, after step 8 of 9
    again = [line for line in train(tmp_path, digits) if "checkpoint" not in line]
    assert len(again) == 2 and not again[1]["calibration"]["partial"]
    for name, value in straight[-1]["calibration"]["ours"].items():
        assert again[1]["calibration"]["ours"][name] == pytest.approx(value, rel=1e-12)


def test_an_epoch_without_its_start_is_marked() -> None:
    means = EpochMeans({0: {"total": 2.0}}, 4, {})
    for step in (2, 3):
        means.add(step, StepResult(torch.tensor(3.0), {}, torch.tensor(1)))
    comparison = means.compare_with_target(3)
    assert comparison is not None and comparison.as_record()["partial"] is True
    assert (
        EpochMeans({}, 4, means.state()).compare_with_target(3) is None
    )  # resumed without targets
    assert (
        comparison.format_line()
        == "calibration, epoch 0 over 2 of 4 steps only: total 3.0000 (target 2.0000, +50.0%)"
    )
