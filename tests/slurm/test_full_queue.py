"""A keeper through a queue that takes, or may hold, only so many jobs of this user."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from commands import write_commands

pytest.register_assert_rewrite("fault_case")

from fault_case import Case  # noqa: E402

from pipeline import manifest  # noqa: E402
from slurm.keeper import queue_keeper  # noqa: E402
from slurm.shared import queue  # noqa: E402
from slurm.shared.keeper_notes import list_ended_keepers  # noqa: E402
from slurm.submission.submit import submit  # noqa: E402

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(2400)]

# As an association with MaxSubmitJobs refuses a job; that itself needs a database.
SBATCH = """
if [ "$(squeue -h -t PENDING,RUNNING,COMPLETING -o %j | grep -c ^mugs-)" -ge 3 ]; then
  echo "sbatch: error: AssocMaxSubmitJobLimit" >&2
  exit 1
fi
exec {sbatch} "$@"
"""


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs find the stages of the toy training."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_full_queue_and_a_preemption_for_good(
    slurm_cluster: Any, toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four runs, three places: the keeper submits one after the other, and the preempted one."""
    write_commands(tmp_path / "bin", sbatch=SBATCH.format(sbatch=shutil.which("sbatch")))
    # Jobs take over the path of whoever submits them.
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    first = Case(slurm_cluster, tmp_path, "first", partition="low_cancel")
    second = Case(slurm_cluster, tmp_path, "second", partition="low_cancel")
    # The third of them waits for the first, so it can be taken back for the keeper.
    runs = [first.train, second.train, first.digest, second.digest]
    made = submit(runs, first.profile, leave_room=True)
    assert [each.action for each in made] == ["submitted"] * 2 + ["deferred"] * 2
    assert queue_keeper(runs, first.profile) is not None
    first.at_step(33)
    first.preempt()
    first.finish(600)
    second.finish(600)
    assert first.attempts() == 2
    first.until(lambda: list(list_ended_keepers(runs, tmp_path / "runs")), "the last keeper")
    assert list(list_ended_keepers(runs, tmp_path / "runs")) == ["keeper: finished"]
    assert first.result() == second.result()


def test_at_most_two_runs_at_once(slurm_cluster: Any, toy: None, tmp_path: Path) -> None:
    """Three trainings and what needs them, two in the queue at a time: the keeper brings all."""
    cases = [
        Case(slurm_cluster, tmp_path, name, seconds=0.02, max_at_once=2)
        for name in ("first", "second", "third")
    ]
    runs = [run for case in cases for run in case.runs]
    profile = cases[0].profile
    made = submit(runs, profile, leave_room=True)
    assert [each.action for each in made].count("submitted") == 2
    assert queue_keeper(runs, profile) is not None
    most = 0
    end = time.monotonic() + 900
    while not all(manifest.find_done(cases[0].root, run.run_id) for run in runs):
        queued = queue.find_jobs(runs, cases[0].root).values()
        most = max(most, sum(any(job.can_run for job in jobs) for jobs in queued))
        assert time.monotonic() < end, [case.states() for case in cases]
        time.sleep(0.2)
    assert most == 2
    assert {case.attempts() for case in cases} == {1}
