"""Slurm's three answers, yes, no and none: whoever asks must not take the third for the second."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import run_stage
from pipeline import attempts, runfile
from pipeline.files import write_json_atomic
from pipeline.spec import Resources, StageConfig, StageRun
from slurm import status
from slurm.local.executor import run_locally
from slurm.shared import queue
from slurm.shared.active_runs import find_active_runs
from slurm.shared.exit_codes import EXIT_INTERRUPTED
from slurm.shared.nodes import list_nodes
from slurm.submission.cancel import cancel_runs
from slurm.submission.profile import ClusterProfile
from slurm.submission.submit import submit

RUN = StageRun("tiny", "one", "0123456789ab", StageConfig(), {}, Resources(gpu=False), "x:run")
DOWN = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
Answer = Callable[..., tuple[int, str, str]]
NO_ANSWERS: dict[str, Answer] = {
    "controller down": lambda *_, **__: (1, "", DOWN),
    "time-out": lambda *_, **__: (1, "", "slurm_load_jobs error: Socket timed out on send/recv"),
    "hangs": lambda command, *_, **__: (124, "", f"{command}: no answer in 60 s"),
    "not installed": lambda command, *_, **__: (127, "", f"{command}: not found"),
    "munge": lambda *_, **__: (1, "", "Protocol authentication error"),
    "nothing said": lambda *_, **__: (1, "", ""),
}


def list_nodes_now() -> object:
    return list_nodes(queue.call_scontrol)


@pytest.fixture(params=NO_ANSWERS)
def silent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command of Slurm has an answer."""
    monkeypatch.setattr(queue, "call_slurm", NO_ANSWERS[request.param])


@pytest.fixture
def submitted(tmp_path: Path) -> Path:
    """The folder of a run that was submitted as job 7."""
    run_dir = runfile.write_run_file(tmp_path, RUN)
    (run_dir / queue.SCRIPT).touch()
    write_json_atomic(run_dir / queue.JOB_NOTE, {"job_id": "7", "time": time.time()})
    return run_dir


def get_status(tmp_path: Path) -> status.RunStatus:
    (found,) = status.collect_status([RUN], tmp_path)
    return found


@pytest.mark.parametrize("attempt", ["none", "running", "failed", "interrupted"])
def test_status_does_not_know(silent: None, submitted: Path, tmp_path: Path, attempt: str) -> None:
    if attempt != "none":
        number = attempts.start_attempt(submitted, job_id="7", time=time.time() + 1)
    if attempt == "failed":  # the job may be in the queue again
        attempts.record_failure(submitted, number, error="x", log=submitted)
    if attempt == "interrupted":
        attempts.record_interruption(submitted, number, "SIGUSR2, saved after step 3")
    found = get_status(tmp_path)
    assert (found.state, found.job_id) == ("unknown", "7") and "Slurm did not tell" in found.detail
    assert status.exit_code([found]) == 75
    watched = status.watch_status([RUN], tmp_path, pause_s=0)
    assert len([next(watched) for _ in range(3)]) == 3, "it goes on watching"


def test_what_records_prove_needs_no_answer(silent: None, submitted: Path, tmp_path: Path) -> None:
    number = attempts.start_attempt(submitted, job_id="7")
    attempts.record_failure(submitted, number, error="ValueError: x", log=submitted)
    attempts.record_no_retry(submitted, number, "it would happen again")
    assert get_status(tmp_path).state == "failed"
    queue.record_cancel(submitted, "7")
    assert get_status(tmp_path).state == "failed"


def test_a_run_that_was_never_submitted_needs_no_answer(silent: None, tmp_path: Path) -> None:
    assert get_status(tmp_path).state == "waiting"


def test_run_starts_no_second_copy(silent: None, submitted: Path, tmp_path: Path) -> None:
    (outcome,) = run_locally([RUN], tmp_path)
    assert outcome.state == "not run" and "may be job 7" in outcome.detail
    assert attempts.list_attempts(submitted) == []


def test_clean_keeps_it(silent: None, submitted: Path) -> None:
    assert "may be job 7" in find_active_runs({submitted: RUN.run_id})[submitted]


def test_submit_and_cancel_stop(silent: None, submitted: Path, tmp_path: Path) -> None:
    with pytest.raises(queue.SlurmError):
        submit([RUN], ClusterProfile(run_root=tmp_path))
    with pytest.raises(queue.SlurmError):
        cancel_runs([RUN], tmp_path)
    with pytest.raises(queue.SlurmError):
        queue.cancel_jobs(["7"])
    with pytest.raises(queue.SlurmError):
        queue.query_job_state("7")


@pytest.mark.parametrize("answer", NO_ANSWERS)
@pytest.mark.parametrize("ask", [lambda: queue.query_job_state("7"), list_nodes_now])
def test_the_exit_code_tells_whether_to_try_again(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[], object], answer: str
) -> None:
    """75 where Slurm is silent; 2 where there is no Slurm, and waiting does not help."""
    monkeypatch.setattr(queue, "call_slurm", NO_ANSWERS[answer])
    with pytest.raises(queue.SlurmError) as raised:
        ask()
    code = run_stage._find_code_of_user_error(raised.value)
    assert code == (2 if answer == "not installed" else EXIT_INTERRUPTED)


def test_an_answer_that_is_no_text_is_kept() -> None:
    """As a comment in another encoding; a folder's name is read in the same way."""
    command = ("printf", "7|l\\344ufe")
    assert queue.call_slurm(*command) == (0, "7|l\udce4ufe", "")
    assert os.fsencode("l\udce4ufe") == b"l\xe4ufe"


def test_no_such_job_is_an_answer(
    submitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(command: str, *_: str, **__: Any) -> tuple[int, str, str]:
        if command == "squeue":
            return 0, "", ""
        return 1, "", "slurm_load_jobs error: Invalid job id specified"

    monkeypatch.setattr(queue, "call_slurm", answer)
    assert queue.query_job_state("7") is None
    assert get_status(tmp_path).state == "failed"
    queue.record_cancel(submitted, "7")
    assert get_status(tmp_path).state == "canceled"
    assert status.exit_code([get_status(tmp_path)]) == 0


@pytest.mark.parametrize("slurm", ["RUNNING", "PENDING"])
def test_scontrol_may_answer_where_squeue_does_not(
    submitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: str
) -> None:
    monkeypatch.setattr(queue, "find_jobs", lambda *_: {})
    monkeypatch.setattr(queue, "query_job_state", {"7": slurm}.get)
    assert get_status(tmp_path).state == "queued"


@pytest.mark.parametrize(
    ("reason", "state", "words"),
    [
        ("Priority", "queued", "priority"),
        ("JobHeldUser", "queued", "scontrol release 7"),
        ("DependencyNeverSatisfied", "waiting", "submit again"),
        ("BadConstraints", "blocked", "no node of the cluster fits"),
        ("PartitionTimeLimit", "blocked", "max_hours"),
        ("QOSMaxWallDurationPerJobLimit", "blocked", "max_hours"),
        ("QOSMaxGRESPerJob", "blocked", "ask for less"),
        ("QOSMaxGRESPerUser", "queued", "peruser"),
        ("InvalidAccount", "blocked", "account"),
    ],
)
def test_a_job_that_can_never_start_is_seen(
    submitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    reason: str, state: str, words: str,
) -> None:  # fmt: skip
    origin = f"{os.geteuid()}|{submitted / queue.SCRIPT}|(null)"
    line = f"7|{queue.job_name(submitted)}|PENDING|{reason}|(null)|{origin}"
    answers = {"squeue": (0, line, ""), "scontrol": (1, "", "x")}
    monkeypatch.setattr(queue, "call_slurm", lambda command, *_, **__: answers[command])
    found = get_status(tmp_path)
    assert found.state == state and words in f"{found.detail} {found.detail.lower()}"
    assert status.exit_code([found]) == (state == "blocked")


def test_the_log_is_slurms_own_where_the_attempt_left_none(
    submitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = attempts.start_attempt(submitted, job_id="7", time=time.time() + 1)
    attempts.record_failure(submitted, number, error="x", log=submitted / "logs" / "none.log")
    monkeypatch.setattr(queue, "find_jobs", lambda *_: {})
    monkeypatch.setattr(queue, "query_job_state", lambda _: "FAILED")
    assert get_status(tmp_path).log is None
    (submitted / "logs").mkdir(exist_ok=True)
    own = submitted / "logs" / "7_0_log.err"
    own.write_text("/usr/bin/python: No module named pydantic\n")
    assert get_status(tmp_path).log == str(own)


def test_a_canceled_job_saves_before_it_ends(
    submitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, ...]] = []
    asked: list[int] = []

    def answer(command: str, *arguments: str, **_: Any) -> tuple[int, str, str]:
        if command != "squeue":
            calls.append((command, *arguments))
            assert queue.is_canceled(submitted, "7"), "else it would be requeued"
            return 0, "", ""
        asked.append(1)
        origin = f"{os.geteuid()}|{submitted / queue.SCRIPT}|(null)"
        line = f"7|{queue.job_name(submitted)}|RUNNING|None|(null)|{origin}"
        return 0, line if len(asked) < 3 else "", ""

    monkeypatch.setattr(queue, "call_slurm", answer)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert cancel_runs([RUN], tmp_path) == ["7"]
    assert calls == [("scancel", "--signal=USR2", "7"), ("scancel", "7")]
    assert len(asked) == 3
