"""Attempts of a run: who takes which number, what each leaves, what the next one finds."""

import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import attempts
from pipeline.attempts import StaleAttemptError
from pipeline.files import write_json_atomic


def test_numbers_are_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempts.latest_attempt(tmp_path) == 0
    assert [attempts.start_attempt(tmp_path, job_id=job) for job in "ab"] == [1, 2]
    # As if others had taken both after this one had looked.
    monkeypatch.setattr(attempts, "latest_attempt", lambda _: 0)
    assert attempts.start_attempt(tmp_path, launch="l", job_id="c") == 3
    assert [attempts.read_attempt(tmp_path, number)["job_id"] for number in (1, 2, 3)] == [*"abc"]
    found = attempts.read_attempt(tmp_path, 3)
    assert (found["launch"], found["host"]) == ("l", socket.gethostname())
    assert attempts.read_attempt(tmp_path, 4) == {}


def test_ranks_wait_for_the_number_of_their_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 takes it while they sleep for the third time; a launch may have a second number."""
    clock = SimpleNamespace(now=0.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds
        if round(clock.now / 0.05) == 3:
            attempts.start_attempt(tmp_path, launch="ours", time=0.0)

    fake = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 0.0, sleep=sleep)
    monkeypatch.setattr(attempts, "time", fake)
    attempts.start_attempt(tmp_path, launch="other")
    assert attempts.find_attempt(tmp_path, "ours") == 2
    attempts.start_attempt(tmp_path, launch="ours")
    attempts.start_attempt(tmp_path, launch="other")
    assert attempts.find_attempt(tmp_path, "ours") == 3
    with pytest.raises(TimeoutError, match="rank 0 of 'nobody' took no number in 7 s"):
        attempts.find_attempt(tmp_path, "nobody", timeout_s=7.0)
    assert 7 < clock.now < 7.5


def test_only_the_newest_may_publish(tmp_path: Path) -> None:
    for _ in range(2):
        attempts.start_attempt(tmp_path)
    with pytest.raises(StaleAttemptError, match="attempt 1 is not the newest"):
        attempts.check_newest(tmp_path, 1)
    attempts.check_newest(tmp_path, 2)
    assert not attempts.is_newest_attempt(tmp_path, 1) and attempts.is_newest_attempt(tmp_path, 3)


def test_the_first_error_of_an_attempt_is_kept(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        attempts.start_attempt(tmp_path)
        if number != 2:
            for error in ("first", "second"):
                facts: dict[str, Any] = {"step": number, "host": "n1", "repeatable": number == 1}
                attempts.record_failure(tmp_path, number, error=error, log=Path("log"), **facts)
    attempts.record_no_retry(tmp_path, 3, "no more")
    found = attempts.list_failures(tmp_path)
    assert [(f.attempt, f.error, f.step, f.repeatable, f.no_retry_reason) for f in found] == [
        (1, "first", 1, True, ""),
        (3, "first", 3, False, "no more"),
    ]
    assert {(failure.log, failure.host) for failure in found} == {("log", "n1")}
    assert attempts.read_failure(tmp_path) == found[1]
    assert attempts.read_failure(tmp_path, 1) == found[0]
    assert attempts.read_failure(tmp_path, 2) is None


def test_saves_and_interruptions(tmp_path: Path) -> None:
    for _ in range(4):
        attempts.start_attempt(tmp_path)
    attempts.record_interruption(tmp_path, 1, "USR2", saved=True)
    attempts.record_interruption(tmp_path, 2, "TERM")
    for step, seconds in ((5, 20.0), (6, 70.0), (7, 30.0)):
        attempts.record_save(tmp_path, 3, step=step, seconds=seconds)
    assert [attempts.has_saved(tmp_path, number) for number in (1, 2, 3, 4)] == [
        True,
        False,
        True,
        False,
    ]
    assert [attempts.read_interruption(tmp_path, number) for number in (1, 2, 3)] == [
        "USR2",
        "TERM",
        None,
    ]
    (save,) = attempts.list_saves(tmp_path)
    assert (save["step"], save["seconds"]) == (7, 70.0)


def test_code_that_changes_back_is_another_version(tmp_path: Path) -> None:
    """The third attempt recorded nothing, the fifth runs on another host only."""
    facts = ({"git_sha": "a"}, {"git_sha": "b"}, None, {"git_sha": "a"}, {"host": "n2"})
    for number, found in enumerate(facts, 1):
        attempts.start_attempt(tmp_path)
        if found is not None:
            inputs = {"list": {"size": number}}
            attempts.record_provenance(tmp_path, number, {"git_sha": "a", "inputs": inputs} | found)

    def versions(before: int | None) -> list[tuple[int, str]]:
        every = attempts.list_code_versions(tmp_path, before=before)
        return [(each["attempt"], each["git_sha"]) for each in every]

    assert versions(None) == versions(5) == [(1, "a"), (2, "b"), (4, "a")]
    assert versions(4) == [(1, "a"), (2, "b")] and versions(1) == []
    assert attempts.read_inputs(tmp_path, 2) == {"list": {"size": 2}}
    assert attempts.read_inputs(tmp_path, 3) == {}


@pytest.mark.parametrize(
    ("name", "facts", "running"),
    [
        ("slurm.node.job", {}, True),
        ("slurm.node.job", {"host": "elsewhere"}, False),
        ("another", {}, False),  # the number of a process that died was given away
        ("slurm.node.job", {"pid": 1 << 30}, False),
    ],
)
def test_a_process_is_ours_by_host_number_and_command(
    tmp_path: Path, name: str, facts: dict[str, Any], running: bool
) -> None:
    assert not attempts.is_running_here(tmp_path)
    process = subprocess.Popen(["sh", "-c", "read line", name], stdin=subprocess.PIPE)
    try:
        attempts.start_attempt(tmp_path, **{"pid": process.pid} | facts)
        assert attempts.is_running_here(tmp_path) == running
        write_json_atomic(tmp_path / "attempts" / "0001.json", {"host": socket.gethostname()})
        assert not attempts.is_running_here(tmp_path)
    finally:
        process.communicate(b"\n")
