"""Faults that concern one job: what is done to a training, and what must be seen of it."""

from functools import partial
from pathlib import Path
from typing import Any

from fault_case import Case, Fault

from pipeline import attempts
from slurm.submission.cancel import cancel_runs


def undisturbed(case: Case) -> None:
    case.finish()
    assert case.attempts() == 1


def requeued(case: Case) -> None:
    case.survives(30, lambda: case.scontrol("requeue", case.job_id))
    assert case.facts()["Restarts"] == "1"


def warned(case: Case, signal: str = "USR2") -> None:
    """USR2 alone, as before a time limit or at a preemption with `preempt_send_user_signal`:
    no step is lost.

    TERM alone, as in the grace time of a preemption: saved as well.
    """
    case.survives(33, lambda: case.cluster.run("scancel", f"--signal={signal}", case.job_id))
    assert case.steps() <= 61, case.steps()


def warned_while_importing(case: Case) -> None:
    case.until(lambda: case.processes("-m slurm.node.job"), "Python runs")
    case.cluster.run("scancel", "--signal=USR2", case.job_id)
    case.until(lambda: case.facts().get("Restarts") == "1", "requeued")
    assert case.steps() == 0, "too late for this test"
    case.finish()


def cancelled(case: Case) -> None:
    case.at_step(30)
    case.cluster.run("scancel", case.job_id)
    case.until(lambda: case.states()[0].state == "canceled", "stopped")
    case.until(lambda: case.states()[1].state == "waiting", "dependent left the queue")
    assert "CANCELLED" in case.states()[0].detail and case.facts()["Restarts"] == "0"
    case.submit()
    case.finish()


def canceled(case: Case) -> None:
    """`cancel` of the training: it saves, what needs it leaves the queue, `submit` goes on."""
    case.at_step(33)
    assert cancel_runs([case.train], case.root) == [case.job_id]
    case.until(lambda: case.states()[0].state == "canceled", "stopped")
    case.until(lambda: case.states()[1].state == "waiting", "dependent left the queue")
    assert case.facts()["Restarts"] == "0"
    case.submit()
    case.finish()
    assert case.attempts() == 2 and case.steps() <= 61, case.steps()


def rank_killed(case: Case) -> None:
    case.survives(30, lambda: case.kill("-m slurm.node.job"))
    assert "killed by SIGKILL" in attempts.read_failure(case.run_dir, 1).error


def crashed(case: Case) -> None:
    """An error that another attempt may not meet: again, on the other node."""
    case.finish()
    failure = attempts.read_failure(case.run_dir, 1)
    assert failure.step == 30 and "CUDA error" in failure.error
    hosts = [str(attempts.read_attempt(case.run_dir, number)["host"]) for number in (1, 2)]
    assert hosts[0] != hosts[1] or not case.cluster.namespaces, hosts


def crashes_always(case: Case) -> None:
    case.until(lambda: "failed twice after step 30" in case.states()[0].detail, "given up")
    assert case.attempts() == 2 and case.states()[0].state == "failed"


def aborted_at_exit(case: Case) -> None:
    """A process that dies once its run is done, as libraries let it at their end:
    the job has ended well.
    """
    case.finish()
    assert case.attempts() == 1 and case.facts()["JobState"] == "COMPLETED"


def hung(case: Case) -> None:
    case.finish()
    failure = attempts.read_failure(case.run_dir, 1)
    assert "hung: no step for" in failure.error and failure.step == 30
    assert "toy_training.py" in Path(failure.log).read_text(), "no stacks"


def batch_step_killed(case: Case) -> None:
    """The batch script's slurmstepd: the ranks go on and finish;
    Slurm takes it for a lost node and starts it again.
    """
    case.at_step(30)
    case.kill(f"slurmstepd: [{case.job_id}.batch]")
    case.until(
        lambda: case.facts()["Restarts"] == "1" and case.facts()["JobState"] == "COMPLETED",
        "again, for nothing",
    )
    case.finish()
    assert case.attempts() == 1


def batch_shell_killed(case: Case) -> None:
    """The batch script itself: nobody is left to queue the job again but rank 0."""
    case.survives(30, lambda: case.kill("slurm_script"))
    assert case.facts()["Restarts"] == "1"


def time_limit(case: Case) -> None:
    """One minute for a training that takes as long, saved on the warning half a minute before.

    Slurm may send it up to a minute earlier, so only the training has so short a limit: what cannot
    save would be stopped as soon as it begins.
    """
    case.finish()
    assert case.attempts() >= 2 and case.steps() <= 60 + case.attempts(), (
        case.attempts(),
        case.steps(),
    )


JOB_FAULTS: dict[str, tuple[Fault, dict[str, Any]]] = {
    "time_limit": (time_limit, {"seconds": 0.5, "hours": 1 / 60}),
    "undisturbed": (undisturbed, {}),
    "requeued": (requeued, {}),
    "warned": (warned, {}),
    "terminated": (partial(warned, signal="TERM"), {}),
    "warned_while_importing": (warned_while_importing, {}),
    "cancelled": (cancelled, {}),
    "canceled": (canceled, {}),
    "rank_killed": (rank_killed, {}),
    "crashed": (crashed, {"fault": "crash"}),
    "crashes_always": (crashes_always, {"fault": "crash always"}),
    "aborted_at_exit": (aborted_at_exit, {"fault": "abort at exit"}),
    "hung": (hung, {"fault": "hang", "hang_minutes": 0.1}),
    "batch_step_killed": (batch_step_killed, {}),
    "batch_shell_killed": (batch_shell_killed, {}),
}
