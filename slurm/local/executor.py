"""The local executor: stage runs on this machine, one after the other, each on some processes.

A run that only watches another one, such as the k-NN curve of a pretraining, runs beside it at the
lowest priority. On a machine with GPUs the other one takes them all, so there it runs after it.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline import attempts, manifest, runfile
from pipeline.ownership import keep_others_from_writing
from pipeline.spec import StageRun
from slurm.local.processes import LocalProcesses, Ranks, stop_processes, wait_for_ranks
from slurm.shared import queue
from slurm.shared.active_runs import ask_for_jobs, may_have_job
from slurm.shared.costs import count_gpus_here
from slurm.shared.exit_codes import EXIT_INTERRUPTED
from slurm.shared.logs import find_rank_log

Announce = Callable[[StageRun, int], None]


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    `state` is done (it was before) | finished (now) | failed | interrupted | not run.
    """

    run: StageRun
    state: str
    detail: str = ""
    seconds: float = 0.0
    log: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether the run's outputs are there."""
        return self.state in ("done", "finished")


def run_locally(
    runs: Sequence[StageRun],
    run_root: Path,
    *,
    ranks: int | None = None,
    env: Mapping[str, str] | None = None,
    on_start: Announce | None = None,
) -> list[Outcome]:
    """Run what is not done, in the given (topological) order.

    If a run fails, what depends on it is not run and the rest is. After an interruption nothing
    more is run. The ranks get the variables of `env` too. `on_start` is called with each run and
    its number of ranks.

    Raises:
        ConfigError: an input is neither done nor among `runs`.
    """
    keep_others_from_writing()
    by_id = {run.run_id: run for run in runs}
    manifest.check_inputs(run_root, runs, "run it too")
    jobs, silence = ask_for_jobs(runs, run_root)
    elsewhere = {
        run.run_id: reason
        for run in runs
        if (reason := _describe_elsewhere(run, run_root, jobs.get(run.run_id, []), silence))
    }
    outcomes: dict[str, Outcome] = {}
    with LocalProcesses(env) as processes:
        executor = _Executor(run_root, ranks, on_start, processes)
        for run in by_id.values():
            if run.run_id in outcomes:
                continue  # it ran beside the one that it watches
            if known := _outcome_without_start(run, run_root, elsewhere, outcomes):
                found = [known]
            elif processes.signaled:
                found = [Outcome(run, "interrupted", "not begun; run again to resume")]
            else:
                watching = [
                    other
                    for other in _concurrent_runs(run, by_id.values(), run_root)
                    if not _outcome_without_start(other, run_root, elsewhere, outcomes)
                ]
                found = executor.run(run, watching)
            outcomes |= {outcome.run.run_id: outcome for outcome in found}
            if any(outcome.state == "interrupted" for outcome in found):
                break
    return [outcomes[run_id] for run_id in by_id if run_id in outcomes]


def _describe_elsewhere(
    run: StageRun, run_root: Path, jobs: Sequence[queue.QueuedJob], silence: str
) -> str:
    """Return who else has begun a run, or how it is or may be in a cluster's queue; else ""."""
    if reason := runfile.find_other_beginner(run_root, run):
        return reason
    if alive := [job for job in jobs if job.can_run]:
        return f"is job {alive[0].job_id} of the cluster, {alive[0].state}"
    run_dir = run.run_dir(run_root)
    if silence and (job_id := may_have_job(run_dir, run.run_id)):
        return (
            f"may be job {job_id} of a cluster; Slurm did not tell: {silence}. If that job is "
            f"over, remove {run_dir / queue.SCRIPT} and {queue.JOB_NOTE} beside it"
        )
    return ""


def _outcome_without_start(
    run: StageRun,
    run_root: Path,
    elsewhere: Mapping[str, str],
    outcomes: Mapping[str, Outcome],
) -> Outcome | None:
    """Return the outcome of a run that need not or must not be started; None if it is to start."""
    if manifest.find_done(run_root, run.run_id) is not None:
        return Outcome(run, "done")
    inputs = [outcomes[need] for need in run.needs.values() if need in outcomes]
    if missing := [outcome.run.name for outcome in inputs if not outcome.succeeded]:
        return Outcome(run, "not run", f"needs {', '.join(missing)}")
    if run.run_id in elsewhere:
        return Outcome(run, "not run", elsewhere[run.run_id])
    run_dir = run.run_dir(run_root)
    if attempts.is_running_here(run_dir):
        pid = attempts.read_attempt(run_dir, attempts.latest_attempt(run_dir)).get("pid")
        return Outcome(run, "not run", f"is running on this machine already, process {pid}")
    return None


def _concurrent_runs(run: StageRun, runs: Iterable[StageRun], run_root: Path) -> Iterable[StageRun]:
    """Yield the runs that may run beside this one: they watch it, and their other inputs are done.

    None where there are GPUs.
    """
    for other in runs:
        if run.run_id in other.watched and not count_gpus_here():
            needs = set(other.needs.values()) - {run.run_id}
            if all(manifest.find_done(run_root, need) for need in needs):
                yield other


def _count_ranks(run: StageRun, asked: int | None) -> int:
    """Return the ranks that the user asked for, else those of the run's resources.

    Without a wish of the user, there is at most one rank per GPU, and one if there is no GPU. A
    stage that does everything in one process has one rank in any case.
    """
    if run.config.one_rank:
        return 1
    wanted = run.resources.ranks
    return asked or (min(wanted, max(1, count_gpus_here())) if run.resources.gpu else wanted)


@dataclass(frozen=True)
class _Executor:
    """Starts runs and waits for them."""

    run_root: Path
    ranks: int | None
    announce: Announce | None
    processes: LocalProcesses

    def run(self, run: StageRun, watching: Sequence[StageRun]) -> list[Outcome]:
        """Run one run and, beside it, those that watch it; they are stopped if it fails."""
        wait = self._start(run, beside=False)
        waits_beside = [self._start(other, beside=True) for other in watching]
        outcome = wait()
        if outcome.succeeded or self.processes.signaled:
            return [outcome, *(wait_beside() for wait_beside in waits_beside)]
        stop_processes(self.processes.started)
        return [outcome, *(Outcome(other, "not run", f"needs {run.name}") for other in watching)]

    def _start(self, run: StageRun, *, beside: bool) -> Callable[[], Outcome]:
        """Start a run and return a function that waits for it and returns its outcome."""
        count = _count_ranks(run, self.ranks)
        if self.announce:
            self.announce(run, count)
        launch = f"local-{uuid.uuid4().hex[:12]}"
        started_at = time.monotonic()
        run_dir = runfile.write_run_file(self.run_root, run)
        on_gpus = run.resources.gpu and count_gpus_here() > 0
        ranks = self.processes.start(run_dir, launch, count, beside=beside, on_gpus=on_gpus)
        return partial(self._wait, run, launch, started_at, ranks)

    def _wait(self, run: StageRun, launch: str, started_at: float, ranks: Ranks) -> Outcome:
        run_dir = run.run_dir(self.run_root)
        codes = wait_for_ranks(ranks)
        seconds = time.monotonic() - started_at
        # First of all: a run that is done has succeeded, whatever ended its processes after that.
        if manifest.find_done(self.run_root, run.run_id) is not None:
            return Outcome(run, "finished", "", seconds)
        if self.processes.signaled or EXIT_INTERRUPTED in codes:
            number = attempts.latest_attempt(run_dir)
            reason = attempts.read_interruption(run_dir, number) or "stopped at once"
            return Outcome(run, "interrupted", f"{reason}; run again to resume", seconds)
        failure = _find_failure(run_dir, launch, codes)
        return Outcome(run, "failed", failure.error, seconds, failure.log)


def _find_failure(run_dir: Path, launch: str, codes: Sequence[int | None]) -> attempts.Failure:
    """Return the failure of a launch; record it first if the ranks could not."""
    try:
        number = attempts.find_attempt(run_dir, launch, timeout_s=0)
    except TimeoutError:
        number = attempts.start_attempt(run_dir, launch=launch)
    # A rank that a signal ended could not say so; the others then failed because of it.
    ended = [(rank, code) for rank, code in enumerate(codes) if code]
    killed = [(rank, code) for rank, code in ended if code < 0]
    rank, code = [*killed, *ended, (0, 0)][0]
    # subprocess reports a process that a signal ended as minus the number of the signal.
    how = f"was killed by signal {-code}" if code and code < 0 else f"ended with exit code {code}"
    log = find_rank_log(run_dir, number, rank)
    attempts.record_failure(run_dir, number, error=f"rank {rank} {how}", log=log)
    failure = attempts.read_failure(run_dir, number)
    assert failure is not None
    return failure
