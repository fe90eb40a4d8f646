"""What becomes of a job that failed: decided from its attempts' records,
with Slurm's command replaced.
"""

import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline import attempts, manifest, runfile
from pipeline.files import write_json_atomic
from pipeline.spec import Resources, StageConfig, StageRun
from slurm.node import on_exit, requeue
from slurm.node.on_exit import describe_exit_code, handle_srun_exit, why_not_retry
from slurm.shared import queue

RUN = StageRun("tiny", "x", "0123456789ab", StageConfig(), {}, Resources(max_failures=3), "x:run")


def failed(step: int | None, **facts: Any) -> attempts.Failure:
    return attempts.Failure(1, "RuntimeError: x", "log", 0.0, step=step, **facts)


@pytest.mark.parametrize(
    ("failures", "words"),
    [
        ([failed(5)], None),
        ([failed(5), failed(9)], None),
        ([failed(5, repeatable=True)], "would happen again"),
        ([failed(5), failed(5)], "failed twice after step 5"),
        ([failed(None), failed(None)], "failed twice before the first step"),
        ([failed(1), failed(2), failed(3)], "3 attempts failed"),
    ],
)
def test_why_not_retry(failures: list[attempts.Failure], words: str | None) -> None:
    found = why_not_retry(failures, 3)
    assert found is None if words is None else found is not None and words in found


class Slurm:
    """Answers of scontrol: a running job in a partition of four nodes."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.job = "JobState=RUNNING Partition=p NumNodes=1 ReqNodeList=(null) ExcNodeList=n9"
        self.nodes = "\n".join(
            f"NodeName={name} CPUTot=8 RealMemory=1000 State=IDLE Partitions=p"
            for name in ("n1", "n2", "n3", "n9")
        )

    def __call__(self, *arguments: str) -> tuple[int, str]:
        if arguments[:2] == ("-o", "show"):
            return 0, self.job if arguments[2] == "job" else self.nodes
        if arguments[:2] == ("show", "hostnames"):
            return 0, arguments[2].replace(",", "\n")
        self.calls.append(arguments)
        return 0, ""


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    fake = Slurm()
    monkeypatch.setattr(requeue, "_scontrol", fake)
    for key, value in {
        "JOB_ID": "7",
        "RESTART_COUNT": "1",
        "JOB_NODELIST": "n1",
        "JOB_NUM_NODES": "1",
    }.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    return fake


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return runfile.write_run_file(tmp_path, RUN)


@pytest.fixture
def started(run_dir: Path) -> Path:
    """The folder of a run that this job has started."""
    attempts.start_attempt(run_dir, launch="slurm-7-1", job_id="7")
    return run_dir


def test_a_killed_rank_is_noted_and_the_job_starts_again_elsewhere(
    started: Path, slurm: Slurm
) -> None:
    handle_srun_exit(started, 128 + signal.SIGKILL)
    failure = attempts.read_failure(started)
    assert "killed by SIGKILL, on n1" in failure.error and failure.host == "n1"
    assert slurm.calls == [("requeue", "7"), ("update", "JobId=7", "ExcNodeList=n9,n1")]


def test_a_start_that_came_to_nothing_is_an_attempt(run_dir: Path, slurm: Slurm) -> None:
    attempts.start_attempt(run_dir, launch="slurm-6-0", job_id="6")
    handle_srun_exit(run_dir, 1)
    assert attempts.latest_attempt(run_dir) == 2 and attempts.read_failure(run_dir) is not None
    assert slurm.calls[0] == ("requeue", "7")
    handle_srun_exit(run_dir, 1)
    assert attempts.read_failure(run_dir).no_retry_reason == "", (
        "the same attempt once more, not a second failure"
    )


def test_the_same_step_twice_ends_it_with_the_reason(run_dir: Path, slurm: Slurm) -> None:
    for restart in (0, 1):
        attempts.record_failure(
            run_dir,
            attempts.start_attempt(run_dir, launch=f"slurm-7-{restart}", job_id="7"),
            error="RuntimeError: x",
            log=run_dir / "log",
            step=40,
            host="n1",
        )
    handle_srun_exit(run_dir, 1)
    assert attempts.read_failure(run_dir).no_retry_reason == "failed twice after step 40"
    assert slurm.calls == []


def test_failures_before_this_submission_do_not_count(run_dir: Path, slurm: Slurm) -> None:
    for job_id in ("5", "6", "7"):
        attempts.record_failure(
            run_dir,
            attempts.start_attempt(run_dir, launch=f"slurm-{job_id}-1", job_id=job_id),
            error="RuntimeError: x",
            log=run_dir / "log",
            step=40,
        )
    handle_srun_exit(run_dir, 1)
    assert slurm.calls == [("requeue", "7")]


def test_the_step_of_a_killed_rank_is_what_its_progress_said(started: Path, slurm: Slurm) -> None:
    write_json_atomic(started / "progress.json", {"done": 31, "unit": "steps", "time": 1e12})
    handle_srun_exit(started, 137)
    assert attempts.read_failure(started).step == 31


def test_an_interrupted_job_goes_on_unless_rank_0_saw_to_that(started: Path, slurm: Slurm) -> None:
    handle_srun_exit(started, 75)
    assert slurm.calls == [("requeue", "7")] and attempts.read_failure(started) is None
    slurm.job = "JobState=PENDING"
    handle_srun_exit(started, 75)
    assert slurm.calls == [("requeue", "7")]


@pytest.mark.parametrize("code", [128 + signal.SIGUSR2, 128 + signal.SIGABRT, 1])
def test_a_run_that_is_done_has_ended_well(started: Path, slurm: Slurm, code: int) -> None:
    """A late warning or a crash at exit is no failure of the run:
    its dependent jobs wait for exit code 0.
    """
    assert handle_srun_exit(started, code) == code
    asked, failure = list(slurm.calls), attempts.read_failure(started)
    manifest.record_entry(
        started.parents[1],
        manifest.ManifestEntry(stage=RUN.stage, name=RUN.name, run_id=RUN.run_id),
    )
    assert handle_srun_exit(started, code) == 0
    assert (slurm.calls, attempts.read_failure(started)) == (asked, failure)


def test_a_job_that_was_overtaken_does_nothing(started: Path, slurm: Slurm) -> None:
    attempts.start_attempt(started, launch="slurm-7-2", job_id="7")
    handle_srun_exit(started, 137)
    attempts.start_attempt(started, launch="slurm-8-0", job_id="8")
    handle_srun_exit(started, 137)
    assert slurm.calls == [] and attempts.read_failure(started) is None


def test_a_cancelled_job_is_not_requeued(started: Path, slurm: Slurm) -> None:
    slurm.job = "JobState=COMPLETING"
    handle_srun_exit(started, 137)
    assert slurm.calls == []


def test_any_byte_is_an_exit_code() -> None:
    """Among them 160 to 191, which are no signals, and 255."""
    for code in range(1, 256):
        words = describe_exit_code(code)
        assert f"exit code {code}" in words or "killed by SIG" in words or words == "hung"


@pytest.mark.parametrize("code", [2, 127, 163, 191, 255])
def test_a_job_starts_again_after_any_code(started: Path, slurm: Slurm, code: int) -> None:
    assert handle_srun_exit(started, code) == code
    assert slurm.calls[0] == ("requeue", "7")
    assert f"exit code {code}" in attempts.read_failure(started).error


@pytest.mark.parametrize(
    ("error", "excluded"),
    [
        ("RuntimeError: CUDA error: uncorrectable ECC error", True),
        ("NoGpuError: torch sees no CUDA device on n1, Slurm gave 8", True),
        ("OSError: [Errno 5] Input/output error: '/local/x'", True),
        ("DistNetworkError: The server socket has failed to listen: EADDRINUSE", False),
        ("OSError: [Errno 98] Address already in use", False),
        ("OSError: [Errno 28] No space left on device: '/runs/x'", False),
        ("OSError: [Errno 122] Disk quota exceeded", False),
        ("RuntimeError: [gloo] Connection closed by peer [10.0.0.2]:40", False),
    ],
)
def test_only_a_node_that_may_be_at_fault_is_excluded(
    started: Path, slurm: Slurm, error: str, excluded: bool
) -> None:
    attempts.record_failure(started, 1, error=error, log=started / "log", host="n1")
    handle_srun_exit(started, 1)
    assert (("update", "JobId=7", "ExcNodeList=n9,n1") in slurm.calls) == excluded


def test_a_warned_attempt_resumes_although_another_rank_was_killed(
    started: Path, slurm: Slurm
) -> None:
    attempts.record_interruption(started, 1, "SIGUSR2, saved after step 3")
    handle_srun_exit(started, 137)
    assert slurm.calls == [("requeue", "7")] and attempts.read_failure(started) is None


def test_a_rank_that_dies_ends_the_others_by_sigterm_which_is_no_warning(
    started: Path, slurm: Slurm
) -> None:
    attempts.record_interruption(started, 1, "SIGTERM, saved after step 3")
    handle_srun_exit(started, 137)
    assert "SIGKILL" in attempts.read_failure(started).error


LIMIT = "JobState=RUNNING RunTime=00:57:30 TimeLimit=01:00:00"


@pytest.mark.parametrize(
    ("job", "saved", "stops"),
    [
        (LIMIT, False, True),
        (LIMIT, True, False),
        (LIMIT.replace("57:30", "20:00"), False, False),  # a preemption
        (LIMIT.replace("01:00:00", "UNLIMITED"), False, False),
        ("JobState=RUNNING RunTime=1-11:58:00 TimeLimit=1-12:00:00", False, True),
    ],
)
def test_a_run_that_keeps_nothing_is_stopped_at_its_time_limit(
    started: Path, slurm: Slurm, job: str, saved: bool, stops: bool
) -> None:
    slurm.job = job
    attempts.record_interruption(started, 1, "SIGUSR2 while no step was running", saved=saved)
    assert handle_srun_exit(started, 75) == 75
    failure = attempts.read_failure(started)
    assert slurm.calls == ([] if stops else [("requeue", "7")])
    assert (failure is not None and "resources.hours" in failure.no_retry_reason) == stops


def test_a_checkpoint_of_this_attempt_counts_as_saved(started: Path, slurm: Slurm) -> None:
    slurm.job = LIMIT
    attempts.record_save(started, 1, step=3, seconds=1.0)
    handle_srun_exit(started, 128 + signal.SIGUSR2)
    assert slurm.calls == [("requeue", "7")]


def test_a_canceled_run_ends_after_it_has_saved(started: Path, slurm: Slurm) -> None:
    queue.record_cancel(started, "7")
    handle_srun_exit(started, 75)
    assert slurm.calls == [] and attempts.read_failure(started) is None
    queue.record_cancel(started, "6")  # of an earlier submission
    handle_srun_exit(started, 75)
    assert slurm.calls == [("requeue", "7")]


def test_without_scontrol_the_batch_script_is_told_to_requeue(
    started: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_found(*_: str) -> tuple[int, str]:
        raise requeue.NoScontrolError("scontrol: not found here")

    monkeypatch.setattr(requeue, "_scontrol", not_found)
    assert on_exit.main([str(started), "75"]) == on_exit.EXIT_REQUEUE_ME
    assert on_exit.main([str(started), "137"]) == on_exit.EXIT_REQUEUE_ME


def test_whatever_goes_wrong_in_the_handler_the_code_of_the_ranks_stays(
    started: Path, slurm: Slurm
) -> None:
    (started / "config.yaml").write_text("not ours")
    assert on_exit.main([str(started), "9"]) == 9


@pytest.mark.parametrize(
    ("job", "spared"),
    [
        ("NumNodes=2 ExcNodeList=n9", True),  # n1 goes, of four nodes two are left
        ("NumNodes=3 ExcNodeList=n9", False),
        ("NumNodes=3-4 ExcNodeList=(null)", True),
        ("NumNodes=1 ReqNodeList=n1 ExcNodeList=(null)", False),
        ("NumNodes=1 ExcNodeList=n1", False),
    ],
)
def test_a_node_is_excluded_if_it_can_be_spared(slurm: Slurm, job: str, spared: bool) -> None:
    slurm.job = f"JobState=PENDING Partition=p {job}"
    assert requeue.exclude_node("7", "n1") == spared == bool(slurm.calls)
