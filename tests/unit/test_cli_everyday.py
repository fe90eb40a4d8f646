"""Everyday use of the command line: the last guard, names that users type, dry runs."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import run_stage
from pipeline import files, runfile
from pipeline.plan import select_runs
from pipeline.spec import Resources, StageConfig, StageRun
from slurm import console
from stages.commands.explain import NO_EFFECT, find_run, tabulate_settings
from stages.commands.report import write_report
from stages.commands.reproduction import load_selection
from stages.commands.tables import TablesRequest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "error", [TypeError("no\nsuch luck"), KeyError("x"), RecursionError(), UnicodeError("\u00e9")]
)
def test_an_error_that_nobody_has_foreseen_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(run_stage, "app", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        run_stage.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 70 and type(error).__name__ in line
    (log,) = tmp_path.glob("mugs-error-*.log")
    assert str(log) in line and "Traceback" in log.read_text()


def test_a_full_disk_for_the_traceback_shows_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(OSError("full")))
    assert run_stage.report_internal_error(TypeError("x")) == 70
    assert "TypeError: x" in capsys.readouterr().err


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_an_ascii_terminal_shows_any_path(tmp_path: Path, locale: str) -> None:
    root = tmp_path / "l\u00e4ufe"
    root.mkdir()
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_stage.py"), "status", "--run-root", str(root)],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": locale},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and "ufe: 0 runs" in done.stdout, done


def call_main(
    monkeypatch: pytest.MonkeyPatch, line: str, stdout: object, stderr: object = None
) -> tuple[object, str]:
    """The exit code and what stderr got, unless another stderr is given."""
    seen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["run_stage.py", *line.split()])
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", seen if stderr is None else stderr)
    with pytest.raises(SystemExit) as ended:
        run_stage.main()
    assert sys.stdout is stdout, "the next caller has its own again"
    monkeypatch.undo()
    seen.seek(0)
    return ended.value.code, seen.read()


@pytest.mark.parametrize(
    ("line", "code"), [("plan mini", 0), ("status --watch", 0), ("plan --help", 0), ("tables", 0)]
)
def test_a_reader_that_leaves_early_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, code: int
) -> None:
    """As `head -1` does; not when the command ends either, when Python flushes once more."""
    monkeypatch.setenv("MUGS_RUN_ROOT", str(tmp_path))
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stdout:
        found, said = call_main(monkeypatch, line, stdout)
    assert found == code and "rror" not in said, said


@pytest.mark.parametrize("line", ["plan mini", "tables", "--help"])
def test_output_that_finds_no_room_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str
) -> None:
    monkeypatch.setenv("MUGS_RUN_ROOT", str(tmp_path))
    with open("/dev/full", "w", encoding="utf-8") as full:
        code, said = call_main(monkeypatch, line, full)
    assert code == 2 and "No space left on device" in said
    with open("/dev/full", "w", encoding="utf-8") as full, open(os.devnull, "w") as nowhere:
        assert call_main(monkeypatch, "plan nope", nowhere, full) == (2, "")


def test_ctrl_c_ends_as_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def be_interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slurm.status.collect_status", be_interrupted)
    with open(os.devnull, "w") as nowhere:
        assert call_main(monkeypatch, f"status --run-root {tmp_path}", nowhere)[0] == 75


@pytest.mark.parametrize("path", ["~nosuchuser/x", "~nosuchuser"])
@pytest.mark.parametrize(
    "line",
    [
        "status --run-root PATH",
        "tables PATH",
        "plan mini --cluster PATH",
        "tables --against PATH",
        "export PATH --out x.pth",
        "plan mini --set digits.train_dir=PATH",
    ],
)
def test_a_home_folder_that_nobody_has_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, path: str
) -> None:
    monkeypatch.setenv("MUGS_RUN_ROOT", str(tmp_path))
    seen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    code, said = call_main(monkeypatch, line.replace("PATH", path), seen)
    seen.seek(0)
    assert code == 2 and path in said + seen.read()


def test_a_run_root_with_bytes_that_are_no_text_has_a_report(tmp_path: Path) -> None:
    """Its path stands in the page."""
    root = tmp_path / "l\udce9ufe"
    root.mkdir()
    selection = load_selection(None, None, None, root)
    path, _ = write_report(selection, (), None)
    assert "ufe" in path.read_text(encoding="utf-8")


def test_outputs_that_the_caller_closed_are_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As `>&-` does: Python then has no such stream."""
    monkeypatch.setenv("MUGS_RUN_ROOT", str(tmp_path))
    assert call_main(monkeypatch, "plan mini", None)[0] == 0


@pytest.mark.parametrize("name", ["1", "table1", "Table 1", "TABLE1"])
def test_tables_are_found_by_number(name: str) -> None:
    request = TablesRequest(table=(name,))
    request.check()
    assert request.table == ["table1"]
    assert TablesRequest(explain=(name, "a", "b")).explain == ("table1", "a", "b")


def named(name: str, stage: str) -> StageRun:
    return StageRun(stage, name, "0" * 12, StageConfig(), {}, Resources(), "x:run")


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["knn"], ["knn"]),
        (["logistic"], ["semi_1pct", "semi_10pct"]),
        (["knn", "logistic"], ["knn", "semi_1pct", "semi_10pct"]),
        ([], ["knn", "knn_initial", "semi_1pct", "semi_10pct"]),
    ],
)
def test_the_name_of_a_run_counts_more_than_a_stage(only: list[str], expected: list[str]) -> None:
    runs = [named("knn", "knn"), named("knn_initial", "knn")]
    runs += [named("semi_1pct", "logistic"), named("semi_10pct", "logistic")]
    assert [run.name for run in select_runs(runs, only)] == expected


def test_status_without_a_name_lists_the_run_root(tmp_path: Path) -> None:
    arguments = ["--run-root", str(tmp_path), "--set", "pretrain.epochs=3"]
    planned = CliRunner().invoke(run_stage.app, ["status", "mini", *arguments])
    assert planned.exit_code == 0
    from stages.commands.reproduction import all_runs

    (run,) = [run for run in all_runs("mini", ["pretrain.epochs=3"]) if run.name == "pretrain"]
    runfile.write_run_file(tmp_path, run)
    bad = tmp_path / "knn" / f"knn-{'a' * 12}"
    bad.mkdir(parents=True)
    shown = CliRunner().invoke(run_stage.app, ["status", "--run-root", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert f"run root {tmp_path}: 1 runs" in shown.stdout and "epochs=3" in shown.stdout
    assert "waiting" in shown.stdout and f"left out: {bad}" in shown.output
    # What is asked for comes first.
    assert shown.stdout.index("waiting") < shown.stdout.index("epochs=3")
    only = ["status", "--run-root", str(tmp_path), "--only"]
    assert CliRunner().invoke(run_stage.app, [*only, "pretrain"]).exit_code == 0
    refused = CliRunner().invoke(run_stage.app, [*only, "knn"])
    assert "valid: pretrain" in str(refused.exception)


def test_a_dry_run_prints_the_batch_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # also where there is no Slurm
    monkeypatch.setattr("slurm.shared.queue.call_slurm", None)  # nobody is asked
    (tmp_path / "c.yaml").write_text(f"run_root: {tmp_path}/runs\npartition: p1\n")
    call = ["submit", "mini", "--cluster", str(tmp_path / "c.yaml"), "--dry-run"]
    shown = CliRunner().invoke(run_stage.app, [*call, "--only", "pretrain", "--only", "knn"])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert shown.stdout.count("#!/bin/bash") == 2 and "--partition=p1" in shown.stdout
    assert "afterok:JOB_OF_" in shown.stdout
    shown = CliRunner().invoke(run_stage.app, [*call, "--at-once", "2"])
    assert shown.stdout.startswith("==> at most 2 at once, each when all that it needs is done\n")
    assert not list(tmp_path.glob("runs/**/*.sh"))


def test_a_file_system_that_cannot_flush_folders_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> None:
        raise OSError(code, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    code = errno.EINVAL
    files.sync_path(tmp_path)
    code = errno.EIO
    with pytest.raises(OSError, match=str(tmp_path)):
        files.sync_path(tmp_path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_files_of_other_libraries_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "x").touch(0o600)
        files.follow_umask(tmp_path / "x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_problems_of_a_plan_are_counted_above_them(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_problems([])
    console.show_problems(["a is not set", "b is not set"])
    assert capsys.readouterr().out.splitlines() == [
        "2 problems to solve before submit:",
        "  a is not set",
        "  b is not set",
    ]


def test_settings_that_count_in_the_features_run_are_marked() -> None:
    sources = {}
    for name in ("knn", "knn_initial"):
        run = find_run("mini", name, None)
        sources[name] = {line[0]: line[2] for line in tabulate_settings("mini", run, None, {})}
    assert sources["knn"]["crop"] == sources["knn"]["resize"] == NO_EFFECT
    assert NO_EFFECT not in sources["knn_initial"].values()
