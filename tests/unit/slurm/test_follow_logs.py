"""`logs --follow`: lines as they are written, over attempts and ranks."""

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import run_stage
from pipeline.spec import StageRun
from slurm import watching
from slurm.follow_logs import LogFollower
from slurm.status import RunStatus, collect_status
from stages.commands.reproduction import load_selection


@pytest.fixture
def run(tmp_path: Path) -> StageRun:
    (found,) = load_selection("mini", None, ["digits"], tmp_path).runs
    return found


def write_log(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def test_each_line_is_shown_once_and_whole(run: StageRun, tmp_path: Path) -> None:
    folder = run.run_dir(tmp_path) / "logs"
    first, second = (folder / f"attempt_000{number}_rank0.log" for number in (1, 2))
    follower = LogFollower(tmp_path, lines=2)

    def look(log: Path | None, state: str = "running") -> list[str]:
        found = RunStatus(run, state, log=str(log) if log else None)
        return list(follower.read_new([found]))

    assert look(None, "queued") == ["==> digits: no log yet"]
    write_log(first, "a\nb\n")
    assert look(first) == [f"==> {first}", "a", "b"]
    write_log(first, "c\nd\ne\nno end")
    assert look(first) == ["c", "d", "e"], "of what is new, all"
    assert look(first) == []
    write_log(first, " yet\n")
    assert look(first) == ["no end yet"]
    # Requeued; what is found without a status' help is the newest as well.
    write_log(second, "1\n2\n3\n")
    assert look(None) == [f"==> {second}", "1", "2", "3"]
    write_log(second, "killed in the middle of a l")
    assert look(second, "failed") == ["killed in the middle of a l"]
    second.write_text("anew\n")
    assert look(second) == ["anew"]
    second.unlink()
    os.mkfifo(second)
    assert look(second) == [f"unreadable: {second}: not a regular file"]
    assert look(second) == [], "said once"


def test_only_the_last_lines_of_what_was_there_before(run: StageRun, tmp_path: Path) -> None:
    log = run.run_dir(tmp_path) / "logs/attempt_0001_rank0.log"
    write_log(log, "".join(f"{number}\n" for number in range(100)))
    found = [RunStatus(run, "running", log=str(log))]
    follower = LogFollower(tmp_path, lines=2)
    assert list(follower.read_new(found)) == [f"==> {log}", "98", "99"]


def test_the_log_of_a_run_at_work_is_that_of_its_first_rank(
    run: StageRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.attempts.is_running_here", lambda _: True)
    run_dir = run.run_dir(tmp_path)
    (run_dir / "attempts").mkdir(parents=True)
    (run_dir / "attempts/0001.json").write_text('{"attempt": 1}')
    for rank in (0, 1):
        write_log(run_dir / f"logs/attempt_0001_rank{rank}.log", "x\n")
    os.utime(run_dir / "logs/attempt_0001_rank0.log", (1e9, 1e9))
    (status,) = collect_status([run], tmp_path)
    assert status.state == "running"
    assert status.log == str(run_dir / "logs/attempt_0001_rank0.log")


def test_the_command_ends_with_the_run(
    run: StageRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = run.run_dir(tmp_path) / "logs/attempt_0001_rank0.log"
    texts = iter(["begun\n", "at work\n", "done\n"])
    states = iter(["running", "running", "done"])

    def look(*_: Any) -> list[RunStatus]:
        write_log(log, next(texts))
        return [RunStatus(run, next(states), log=str(log))]

    monkeypatch.setattr(watching, "collect_status", look)
    monkeypatch.setattr(watching.time, "sleep", lambda _: None)
    call = ["logs", "mini", "digits", "-f", "--run-root", str(tmp_path)]
    done = CliRunner().invoke(run_stage.app, call)
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [f"==> {log}", "begun", "at work", "done"]
