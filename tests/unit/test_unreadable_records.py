"""Every record of a run, damaged or planted in every way, under what each command does.

One bad file costs one row that names it: no hang, no traceback, and the other rows stay.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline import attempts, manifest, runfile
from pipeline.files import read_json, with_checksum, write_atomic
from pipeline.manifest import ManifestEntry
from pipeline.spec import Resources, StageRun
from results import explain, publish
from results.collect import CollectedResults
from results.figures.all_figures import draw_all_figures
from results.figures.curves import read_curves
from results.figures.gallery import collect_galleries
from results.report.page import render_report
from results.runs import FinishedRun
from results.schema import ResultRow
from results.store import RowsError, write_rows
from slurm.console import show_log
from slurm.shared import queue
from slurm.shared.active_runs import find_active_runs
from slurm.shared.logs import find_newest_log, log_path
from slurm.status import RunStatus, collect_status, exit_code
from slurm.submission import estimates, lock
from stages.commands import finished_results
from stages.commands.clean import clean_run_root
from stages.commands.finished_results import collect_finished
from stages.commands.verify import verify_runs
from stages.commands.whole_run_root import load_all_runs
from stages.knn import KnnConfig

Damage = Callable[[Path], object]
GOOD = StageRun("knn", "good", "00000000000a", KnnConfig(), {}, Resources(), "x:run")
BAD = StageRun("knn", "bad", "00000000000b", KnnConfig(), {}, Resources(), "x:run")
ROW = ResultRow("", "mugs", "vit_s16", 800, "finetune", "imagenet1k", "", "top1", 82.6, "%", 0)

# What of a run that is not done may be damaged, with its content. Times are long ago, so that
# nothing counts as running.
RECORDS: dict[str, dict[str, Any]] = {
    "attempts/0001.json": {"host": "n1", "pid": 1, "time": 9.0, "launch": "x", "gpus": 1},
    "attempts/0001.failed.json": {"error": "E", "log": "", "time": 9.0, "step": 3, "host": "n1"},
    "attempts/0001.interrupted.json": {"reason": "USR2", "saved": True, "time": 9.0},
    "attempts/0001.saved.json": {"step": 3, "seconds": 2.0, "time": 9.0},
    "attempts/0001.provenance.json": {"git_sha": "1", "versions": {}, "inputs": {}},
    "job.json": {"job_id": "17", "time": 19.0},
    "canceled.json": {"job_id": "17", "time": 9.0},
    "progress.json": {"done": 3, "total": 9, "unit": "steps", "rate": 2.0, "time": 9.0},
    "claims/0001.json": {"host": "n1", "user": 1, "pid": 1, "began": "1", "time": 1.0},
}
# Records that `status` does not need, and so does not name.
NOT_NEEDED = ("saved", "provenance", "claims")


def replace_by(make: Callable[[Path], object]) -> Damage:
    """A damage that puts something else in the place of a file."""

    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def change_values(change: Callable[[Any], Any]) -> Damage:
    """A damage that changes each value of a record."""

    def damage(path: Path) -> None:
        record = {key: change(value) for key, value in json.loads(path.read_text()).items()}
        path.write_text(json.dumps(record))

    return damage


def make_sparse(path: Path) -> None:
    """Make a file of a terabyte that takes no room."""
    path.touch()
    os.truncate(path, 1 << 40)


def give_away(path: Path) -> None:
    """Give a file to another user."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    os.chown(path, 4321, 4321)


DAMAGES: dict[str, Damage] = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff\0{[" * 99),
    "a list": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_text('{"time":' * 100_000),
    "wrong types": change_values(lambda value: [value]),
    "texts": change_values(lambda value: 7 if isinstance(value, str) else "x"),
    "huge numbers": change_values(lambda value: 10**400),
    "not finite": change_values(lambda value: float("nan")),
    "pipe": replace_by(os.mkfifo),
    "folder": replace_by(Path.mkdir),
    "dangling link": replace_by(lambda path: path.symlink_to("nowhere")),
    "link to itself": replace_by(lambda path: path.symlink_to(path.name)),
    "device": replace_by(lambda path: path.symlink_to("/dev/zero")),
    "terabyte": replace_by(make_sparse),
    "of another user": give_away,
}


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """End what waits for a pipe or reads without end."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError("took more than 60 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run root with a run that is done, and one that has begun. Slurm knows no job."""

    def call_slurm(*command: str, **options: object) -> tuple[int, str, str]:
        return (0, "", "") if command[0] == "squeue" else (1, "", "Invalid job id")

    monkeypatch.setattr(queue, "call_slurm", call_slurm)
    # They take seconds to read, and are not what is damaged here.
    monkeypatch.setattr(finished_results, "load_references", lambda: ())
    for run in (GOOD, BAD):
        run_dir = runfile.write_run_file(tmp_path, run)
        for name in ("attempts", "claims", "logs"):
            (run_dir / name).mkdir()
        add(run_dir, "attempts/0001.json")
        log_path(run_dir, 1, 0).write_text("a line\n")
    record(tmp_path, GOOD)
    return tmp_path


def add(run_dir: Path, name: str) -> Path:
    """Write a record as a run writes it; return its path."""
    return write_atomic(run_dir / name, json.dumps(RECORDS[name]))


def record(root: Path, run: StageRun, **facts: Any) -> Path:
    """Record a run as done; return its entry."""
    run_dir = run.run_dir(root)
    write_rows(run_dir / "rows.csv", [replace(ROW, run_id=run.run_id, seed=int(run is BAD))])
    rows = (run_dir / "rows.csv").relative_to(root).as_posix()
    names = {"stage": run.stage, "name": run.name, "run_id": run.run_id}
    return manifest.record_entry(root, ManifestEntry(**names, rows=rows, **facts))


def run_commands(root: Path) -> RunStatus:
    """Do what the commands do, check that the good run stays, and return the other's status."""
    good, bad = collect_status([GOOD, BAD], root)
    assert (good.state, good.detail) == ("done", "0s")
    assert exit_code([good, bad]) == {"failed": 1, "unknown": 75}.get(bad.state, 0)
    estimates.estimate_save_seconds(BAD, root)
    estimates._measure_step_seconds(BAD, root)
    lock._stale(BAD.run_dir(root), 1)
    attempts.list_failures(BAD.run_dir(root))
    attempts.list_code_versions(BAD.run_dir(root))
    show_log("bad", bad.log or find_newest_log(BAD.run_dir(root)), 40)
    assert not any(
        "good" in line for line in clean_run_root(root, set(), find_active_runs, yes=False)
    )
    assert verify_runs([GOOD], root).problems == []
    assert GOOD.run_id in [result.row.run_id for result in collect_finished(root).results]
    runs, _, left_out = load_all_runs(root, ())
    assert GOOD.run_id in [run.run_id for run in runs] and len(runs) + len(left_out) == 2
    return bad


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_is_none_costs_one_row(root: Path, name: str, damage: str) -> None:
    path = add(BAD.run_dir(root), name)
    if name == "canceled.json":
        add(BAD.run_dir(root), "job.json")
    if name == "job.json":
        (BAD.run_dir(root) / "attempts/0001.json").unlink()
    DAMAGES[damage](path)
    status = run_commands(root)
    assert status.state in ("failed", "waiting")
    if any(word in name for word in NOT_NEEDED):
        return
    # The number of another user's attempt does not count, so it is not read.
    if (name, damage) != ("attempts/0001.json", "of another user"):
        assert f"unreadable: {path}" in status.detail


@pytest.mark.parametrize("name", ["attempts", "claims", "logs", "checkpoints"])
def test_a_file_in_the_place_of_a_folder(root: Path, name: str) -> None:
    path = BAD.run_dir(root) / name
    if path.exists():
        path.rename(path.with_name("before"))
    path.touch()
    if name == "claims":
        with pytest.raises(NotADirectoryError):
            lock._latest(BAD.run_dir(root))
        path.unlink()
    if name == "attempts":
        with pytest.raises(NotADirectoryError):  # a job must not take this for "no newer attempt"
            attempts.is_newest_attempt(BAD.run_dir(root), 1)
        (status,) = collect_status([BAD], root)
        assert f"unreadable: {path}" in status.detail
    else:
        run_commands(root)


@pytest.mark.parametrize("kind", ["file", "pipe", "link to a device", "link to itself"])
def test_something_else_in_the_place_of_a_run_folder_costs_one_row(root: Path, kind: str) -> None:
    run = replace(BAD, run_id="00000000000c")  # nothing of it is there yet
    folder = run.run_dir(root)
    if kind == "file":
        folder.touch()
    elif kind == "pipe":
        os.mkfifo(folder)
    else:
        folder.symlink_to("/dev/zero" if kind == "link to a device" else folder.name)
    before = collect_status([GOOD], root)
    *others, status = collect_status([GOOD, run], root)
    assert others == before
    assert status.state in ("unknown", "waiting") and f"unreadable: {folder}" in status.detail
    assert find_active_runs({folder: run.run_id}) == {}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_log_that_is_none_is_not_waited_for(root: Path, damage: str) -> None:
    if "types" in damage or damage in ("texts", "huge numbers", "not finite"):
        return  # a log holds no values
    add(BAD.run_dir(root), "attempts/0001.failed.json")
    DAMAGES[damage](log_path(BAD.run_dir(root), 1, 0))
    assert run_commands(root).state == "failed"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["manifest", "rows", "run file"])
def test_a_finished_run_that_is_none_costs_one_row(root: Path, name: str, damage: str) -> None:
    entry = record(root, BAD)
    rows = BAD.run_dir(root) / "rows.csv"
    path = {"manifest": entry, "rows": rows, "run file": BAD.run_dir(root) / "config.yaml"}[name]
    if name != "manifest" and damage in ("wrong types", "texts", "huge numbers", "not finite"):
        return  # it is no JSON
    DAMAGES[damage](path)
    status = run_commands(root)
    # Who may write in `manifest/` may add results (docs/security.md).
    is_fine = damage == "of another user" or name == "run file"
    assert status.state == ("done" if is_fine else "failed")
    if name == "manifest" and not is_fine:
        assert f"unreadable: {entry}" in status.detail


ODD: tuple[Any, ...] = ("x", 7, [7], {"x": [7]}, float("inf"))


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize(
    "place",
    [
        *(name for name in ManifestEntry.model_fields if name not in ("run_id", "format_version")),
        *(f"provenance.{name}" for name in ("git_sha", "git_dirty", "versions", "earlier")),
        *(f"info.{name}" for name in ("dataset", "method", "epochs", "captions", "notes")),
        *(f"info.{name}" for name in ("arch", "weights", "trained_feature", "colours")),
        *(f"config.{name}" for name in ("arch", "method", "dataset", "weights", "variant", "mugs")),
        "config.mugs.loss_weights",
    ],
)
def test_an_entry_with_a_checksum_that_fits_costs_one_row(
    root: Path, place: str, value: object
) -> None:
    """Who may write in `manifest/` can record a run with any values."""
    entry = record(root, BAD)
    content = json.loads(entry.read_text())
    del content["sha256"]
    inner = content
    *parents, last = place.split(".")
    for name in parents:
        inner = inner.setdefault(name, {})
    inner[last] = value
    entry.write_text(json.dumps(with_checksum(content)))
    run_commands(root)
    collection = collect_finished(root)
    collect_galleries(collection.runs.values(), root)
    for run in collection.runs.values():
        assert asdict(run) and explain._describe_run(run, collection.runs, None)


def test_a_report_of_damaged_files_shows_the_others(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Metrics, stored features, class names and pictures that are none; runs in a circle."""
    folder = BAD.run_dir(root)
    (folder / "val").mkdir()
    (folder / "val/shard_0.safetensors").write_bytes(b"garbage")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    paths = {
        "features": folder,
        "pictures": folder / "picture.png",
        "val_sidecar": folder / "progress.json",
    }
    (folder / "progress.json").write_text("[")
    os.mkfifo(folder / "metrics.jsonl")
    outputs = {label: manifest.describe_output(root, path) for label, path in paths.items()}
    for stage in ("knn", "features", "pretrain"):
        run_id = BAD.run_id if stage == "knn" else f"{stage:x<12}"
        facts = {"stage": stage, "name": BAD.name, "run_id": run_id, "outputs": outputs}
        needs = {"data": run_id, "weights": "pretrainxxxx"}
        manifest.record_entry(root, ManifestEntry(**facts, upstream=needs))
    (root / "pretrain").mkdir()
    (root / "pretrain/bad-pretrainxxxx").symlink_to(folder)
    page = render_report(collect_finished(root), root)
    assert GOOD.run_id in page
    for name in ("metrics.jsonl", "shard_0.safetensors", "picture.png", "progress.json"):
        assert any(f"/{name}" in line for line in caplog.messages if "unreadable" in line), name


@pytest.mark.parametrize("ahead_s", [0, 86400])
@pytest.mark.parametrize("age_s", [0, 3600])
def test_a_clock_that_is_ahead_does_not_make_a_dead_run_run(
    root: Path, ahead_s: int, age_s: int
) -> None:
    """The time in the file is of the host, and that of the file is of the file server."""
    path = add(BAD.run_dir(root), "progress.json")
    now = time.time()
    path.write_text(json.dumps({"done": 3, "total": 9, "time": now - age_s + ahead_s}))
    os.utime(path, (now - age_s, now - age_s))
    (status,) = collect_status([BAD], root)
    assert status.state == ("failed" if age_s else "running")


LINES: tuple[Any, ...] = (
    7,
    [],
    {"step": 1, "epoch": 0, "loss": "x"},
    {"step": [1], "epoch": 0, "loss": 1.0},
    {"step": 10**400, "epoch": 0, "loss": 1.0},
    {"step": 1, "epoch": None, "loss": 1.0},
    {"step": 1, "epoch": 0, "calibration": 7},
    {"step": 1, "epoch": 0, "calibration": {"ours": {}, "target": {"total": 1}}},
    {"step": 1, "epoch": 0, "calibration": {"ours": [], "target": {}}},
)


@pytest.mark.parametrize("line", LINES, ids=repr)
def test_a_line_of_metrics_that_is_none_is_left_out(tmp_path: Path, line: object) -> None:
    good = {"step": 0, "epoch": 0, "loss": 1.0, "lr": 0.1}
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(each)}\n" for each in (good, line)) + "[" * 100_000)
    curves = read_curves(path)
    assert curves is not None
    assert (curves.steps, curves.epochs) == ([good], [])


@pytest.mark.parametrize("damage", DAMAGES)
def test_metrics_that_are_none_have_no_curves(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}")
    DAMAGES[damage](path)
    assert read_curves(path) is None


SHARDS: dict[str, dict[str, Any]] = {
    "no labels": {"cls": np.zeros((4, 1, 2), np.float32)},
    "other lengths": {"cls": np.zeros((4, 1, 2), np.float32), "labels": np.zeros(3, np.int64)},
    "other shape": {"cls": np.zeros(4, np.float32), "labels": np.zeros(4, np.int64)},
    "not finite": {"cls": np.full((4, 1, 2), np.nan), "labels": np.zeros(4, np.int64)},
    "one feature": {"cls": np.zeros((4, 1, 1), np.float32), "labels": np.zeros(4, np.int64)},
    "a pipe": {},
}


@pytest.mark.parametrize("name", SHARDS)
def test_features_that_are_none_have_no_figure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (tmp_path / "val").mkdir()
    path = tmp_path / "val/shard_0.safetensors"
    if SHARDS[name]:
        save_file(SHARDS[name], path)
    else:
        os.mkfifo(path)
    run = FinishedRun("a", "features", "x", outputs={"features": "."})
    collection = CollectedResults((), {"a": run})
    drawn = draw_all_figures(collection, tmp_path)
    assert [drawing.name for drawing in drawn] == ["figure2"]
    assert f"unreadable: {tmp_path}" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_published_results_that_are_none_are_refused_by_name(root: Path, damage: str) -> None:
    folder = root / "published"
    publish.publish_tables(collect_finished(root), folder)
    assert publish.read_published(folder).results
    DAMAGES[damage](folder / "runs.json")
    if damage == "of another user":
        return
    with pytest.raises(RowsError, match=r"runs\.json"):
        publish.read_published(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_reader_refuses_what_is_no_record(tmp_path: Path, damage: str) -> None:
    path = write_atomic(tmp_path / "x.json", '{"time": 7.0, "host": "n1"}')
    assert read_json(path, {"time": float, "host": str}) == {"time": 7.0, "host": "n1"}
    DAMAGES[damage](path)
    assert read_json(path, {"time": float, "host": str}) is None
