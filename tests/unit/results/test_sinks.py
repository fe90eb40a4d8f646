"""Sinks of metrics: each step once, whatever happened to the training or to the sink."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.plan import build_plan
from pipeline.spec import StageRun
from results.sinks import writers
from results.sinks.reader import MetricsReader, Point
from results.sinks.writers import SinkError, SinkRun, Writer
from stages import STAGES
from stages.commands.sink import Sink

# Packages of extras that are large, and that nothing else needs.
NEEDS_EXTRA = pytest.mark.long


def write_lines(path: Path, steps: Sequence[int], **values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": step / 10, **values}) + "\n")


def read_steps(reader: MetricsReader) -> list[int]:
    return [point.step for point in reader.read_new()]


def test_a_restart_repeats_no_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    assert read_steps(reader) == []
    write_lines(path, [9, 19, 29])
    assert read_steps(reader) == [9, 19, 29]
    write_lines(path, [19, 29, 39])  # from the checkpoint of step 10
    assert read_steps(reader) == [39]


def test_lines_that_are_cut_off(tmp_path: Path) -> None:
    """One that is being written is read later; one that a killed job left is skipped."""
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [9])
    with path.open("a") as file:
        file.write('{"step": 19, "lo')
    reader = MetricsReader(path)
    assert read_steps(reader) == [9]
    with path.open("a") as file:
        file.write('ss": 0.5}\n{"step": 29, "lo')
    write_lines(path, [39])  # behind what the killed job left
    assert read_steps(reader) == [19]
    write_lines(path, [49])
    assert read_steps(reader) == [49]


def test_only_numbers_are_values(tmp_path: Path) -> None:
    """Those of a part have its name; other kinds of lines about the same step are read, too."""
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [9], peak_share=None, name="x", done=True, lr=1)
    write_lines(path, [9], checkpoint={"bytes": 5, "why": "due"})
    first, second = MetricsReader(path).read_new()
    assert first == Point(9, {"loss": 0.9, "lr": 1.0})
    assert second == Point(9, {"checkpoint/bytes": 5.0})


def test_a_file_that_was_made_again_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [9, 19])
    reader = MetricsReader(path)
    assert read_steps(reader) == [9, 19]
    path.unlink()
    write_lines(path, [29])
    assert read_steps(reader) == [29]


@pytest.fixture(scope="module")
def run() -> StageRun:
    runs = build_plan(config.load_reproduction("mini", STAGES))
    (found,) = [run for run in runs if run.name == "pretrain"]
    return found


def pass_on(kind: str, folder: Path, run: StageRun, root: Path) -> dict[str, int]:
    sink = Sink(kind, folder, [run], root, "mini")
    try:
        sink.pass_on()
    finally:
        sink.close()
    return dict(sink.counts)


class Failing(Writer):
    """Fails at its second write, as on a full disk."""

    seen: list[int] = []  # noqa: RUF012 (of all writers of a test)

    def __init__(self, folder: Path, run: SinkRun) -> None:
        self.writes = 0

    def write(self, points: Sequence[Point]) -> None:
        self.writes += 1
        if self.writes == 2:
            raise OSError(28, "No space left on device")
        self.seen += [point.step for point in points]

    def close(self) -> None: ...


def test_a_sink_that_fails_loses_nothing(
    tmp_path: Path, run: StageRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And changes nothing in the folder of the run."""
    monkeypatch.setattr("stages.commands.sink.PART", 2)
    monkeypatch.setitem(writers.WRITERS, "wandb", Failing)
    monkeypatch.setattr(Failing, "seen", [])
    folder = run.run_dir(tmp_path / "runs")
    write_lines(folder / "metrics.jsonl", range(6))
    before = [(path, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            pass_on("wandb", tmp_path / "out", run, tmp_path / "runs")
        if len(Failing.seen) == 4:
            break
    assert pass_on("wandb", tmp_path / "out", run, tmp_path / "runs") == {"pretrain": 2}
    assert Failing.seen == [0, 1, 2, 3, 4, 5]
    assert before == [(path, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, run: StageRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    write_lines(run.run_dir(tmp_path) / "metrics.jsonl", [9])
    with pytest.raises(SinkError, match=r"--to wandb: the package wandb .*\[wandb\]'"):
        pass_on("wandb", tmp_path / "out", run, tmp_path)


def test_tensorboard(tmp_path: Path, run: StageRun) -> None:
    """Event files of two starts of the sink and two of the training, read back as one curve."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = run.run_dir(tmp_path / "runs") / "metrics.jsonl"
    folder = tmp_path / "out"
    write_lines(metrics, [9, 19, 29], lr=0.5)
    assert pass_on("tensorboard", folder, run, tmp_path / "runs") == {"pretrain": 3}
    write_lines(metrics, [19, 29, 39], lr=0.5)
    assert pass_on("tensorboard", folder, run, tmp_path / "runs") == {"pretrain": 1}
    assert pass_on("tensorboard", folder, run, tmp_path / "runs") == {}
    read = EventAccumulator(str(folder / f"pretrain-{run.run_id}"))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == ["loss", "lr"]
    losses = [(event.step, event.value) for event in read.Scalars("loss")]
    assert losses == [(step, pytest.approx(step / 10)) for step in (9, 19, 29, 39)]


@NEEDS_EXTRA
def test_wandb_offline(tmp_path: Path, run: StageRun, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    write_lines(run.run_dir(tmp_path / "runs") / "metrics.jsonl", [9, 19])
    assert pass_on("wandb", tmp_path / "out", run, tmp_path / "runs") == {"pretrain": 2}
    (written,) = (tmp_path / "out" / "wandb").glob(f"offline-run-*/run-{run.run_id}.wandb")
    assert written.stat().st_size > 0


@NEEDS_EXTRA
def test_trackio(tmp_path: Path, run: StageRun, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="needs the extra trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "out")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "out")
    monkeypatch.setenv("TRACKIO_DIR", "")  # put back after the test
    metrics = run.run_dir(tmp_path / "runs") / "metrics.jsonl"
    write_lines(metrics, [9, 19])
    pass_on("trackio", tmp_path / "out", run, tmp_path / "runs")
    write_lines(metrics, [19, 29])
    pass_on("trackio", tmp_path / "out", run, tmp_path / "runs")
    # As after a crash between a write and the note of how far it came.
    (note,) = (tmp_path / "out" / "passed_on").glob("trackio-*.json")
    note.unlink()
    pass_on("trackio", tmp_path / "out", run, tmp_path / "runs")
    found = SQLiteStorage.get_logs("mini", "pretrain")
    assert [(line["step"], line["loss"]) for line in found] == [(9, 0.9), (19, 1.9), (29, 2.9)]


@NEEDS_EXTRA
def test_mlflow(tmp_path: Path, run: StageRun, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    metrics = run.run_dir(tmp_path / "runs") / "metrics.jsonl"
    folder = tmp_path / "out"
    write_lines(metrics, [9, 19])
    pass_on("mlflow", folder, run, tmp_path / "runs")
    write_lines(metrics, [19, 29])
    pass_on("mlflow", folder, run, tmp_path / "runs")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "mini"]
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert sorted(value.step for value in history) == [9, 19, 29]
    assert found.data.params["arch"] == "vit_mini"
