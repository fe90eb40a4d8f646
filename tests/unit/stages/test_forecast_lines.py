"""Which runs `status` and the report forecast, and from which finished ones."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import run_stage
from pipeline import manifest
from pipeline.identity import dump_settings
from pipeline.manifest import ManifestEntry
from pipeline.spec import StageRun
from stages.commands.forecast import list_forecasts, read_curve
from stages.commands.reproduction import all_runs


def write_curve(run: StageRun, root: Path, values: dict[int, float]) -> None:
    """Write the records of epochs as the stage does."""
    folder = run.run_dir(root) / "epochs"
    folder.mkdir(parents=True)
    for epoch, value in values.items():
        record = {"epoch": epoch, "weights": "x", "top1": [[20, 0.07, value]]}
        (folder / f"epoch_{epoch:04d}.json").write_text(json.dumps(record))


def finish(run: StageRun, root: Path) -> None:
    """Record a run as done."""
    config = dump_settings(run.config)
    facts = {"stage": run.stage, "name": run.name, "run_id": run.run_id, "upstream": run.needs}
    run.run_dir(root).mkdir(parents=True, exist_ok=True)
    manifest.record_entry(root, ManifestEntry(**facts, config=config))  # type: ignore[arg-type]


@pytest.fixture
def runs() -> list[StageRun]:
    """The pretraining of mini and its curve, with four seeds."""
    names = ("pretrain", "knn_curve")
    return [run for run in all_runs("mini", seeds=["0", "1", "2", "3"]) if run.stage in names]


def begin(runs: list[StageRun], root: Path, finished: int) -> None:
    """Let curves gain 40, 42, 44 points from epoch 12 on; the last one is not done."""
    curves = [run for run in runs if run.stage == "knn_curve"]
    pretrainings = [run for run in runs if run.stage == "pretrain"]
    for seed in range(finished):
        gain = 40.0 + 2 * seed
        write_curve(curves[seed], root, {0: 10.0, 12: 20.0, 24: 20.0 + gain})
        finish(pretrainings[seed], root)
        finish(curves[seed], root)
    write_curve(curves[3], root, {0: 11.0, 12: 21.0})


def test_a_running_pretraining_is_forecast(runs: list[StageRun], tmp_path: Path) -> None:
    begin(runs, tmp_path, finished=3)
    (running,) = (run for run in runs if run.name == "pretrain_seed3")
    (found,) = list_forecasts(runs, tmp_path, {running.run_id: 7200.0})
    line = found.describe()
    assert line.startswith("pretrain_seed3: k-NN is 21.0 after epoch 12; 63.0 expected at the end")
    assert "from 3 finished runs; ends 2" in line and "after 2.0 hours more" in line
    (queued,) = list_forecasts(runs, tmp_path, {})
    assert "ends" not in queued.describe()
    assert queued.to_json()["ends"] is queued.to_json()["gpu_hours_left"] is None


def test_status_tells_programs_of_the_forecast(runs: list[StageRun], tmp_path: Path) -> None:
    """At the run with the curve; with the fields that the page for programs names."""
    begin(runs, tmp_path, finished=3)
    call = ["status", "mini", "--seeds", "0", "--seeds", "1", "--seeds", "2", "--seeds", "3"]
    shown = CliRunner().invoke(run_stage.app, [*call, "--run-root", str(tmp_path), "--json"])
    by_name = {run["run"]: run for run in json.loads(shown.stdout)}
    assert [name for name, run in by_name.items() if run["forecast"]] == ["knn_curve_seed3"]
    reasons = {name: run["no_forecast"] for name, run in by_name.items()}
    assert reasons.pop("knn_curve_seed3") is None
    assert reasons["knn_curve"] == "the curve is complete"
    assert reasons["pretrain"] == "no k-NN curve" and all(reasons.values())
    found = by_name["knn_curve_seed3"]["forecast"]
    assert found["pretraining"] == by_name["pretrain_seed3"]["run_id"]
    assert (found["epoch"], found["value"], found["expected"]) == (12, 21.0, 63.0)
    assert found["low"] < 63 < found["high"] and found["finished_runs"] == 3
    text = (Path(run_stage.__file__).parent / "AGENTS.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith("| `status --json` |"))
    fields = set(re.findall(r"`(\w+)`", row))
    assert fields == by_name["knn_curve_seed3"].keys() | found.keys()


def test_it_says_what_is_missing(runs: list[StageRun], tmp_path: Path) -> None:
    begin(runs, tmp_path, finished=2)
    (found,) = list_forecasts(runs, tmp_path, {})
    unknown = "pretrain_seed3: forecast unknown: 2 finished runs like it, 3 are needed"
    assert found.describe() == unknown
    facts = found.to_json()
    assert (facts["epoch"], facts["value"], facts["expected"]) == (12, 21.0, None)
    assert facts["finished_runs"] == 2


def test_runs_with_other_settings_do_not_count(runs: list[StageRun], tmp_path: Path) -> None:
    begin(runs, tmp_path, finished=3)
    changed = all_runs("mini", ["pretrain.teacher_momentum=0.9"])
    others = [run for run in changed if run.stage in ("pretrain", "knn_curve")]
    (curve,) = (run for run in others if run.stage == "knn_curve")
    write_curve(curve, tmp_path, {0: 11.0, 12: 21.0})
    (found,) = list_forecasts(others, tmp_path, {})
    assert "forecast unknown: 0 finished runs like it" in found.describe()


def test_damaged_records_are_left_out(runs: list[StageRun], tmp_path: Path) -> None:
    (curve,) = (run for run in runs if run.name == "knn_curve")
    write_curve(curve, tmp_path, {0: 10.0, 3: 12.0})
    folder = curve.run_dir(tmp_path) / "epochs"
    for number, text in enumerate(
        ("", "[]", '{"epoch": 9, "top1": []}', '{"top1": [[1, 1, "x"]]}')
    ):
        (folder / f"epoch_{number + 10:04d}.json").write_text(text)
    assert read_curve(curve.run_dir(tmp_path)) == {0: 10.0, 3: 12.0}


def test_without_curves_nothing_is_said(tmp_path: Path) -> None:
    assert not list(list_forecasts(all_runs("mini"), tmp_path, {}))
