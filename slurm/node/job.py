"""The job: one stage run, on every rank, under Slurm, torchrun or the local executor.

`python -m slurm.node.job RUN_DIR` is the command of all three. All else is read from the run's folder, so a requeued job
starts from what is on disk then. Exit code: 0 done, 1 failed, 75 interrupted (the next attempt goes on).
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pipeline import attempts, manifest, provenance, runfile
from pipeline.control import Interrupted
from pipeline.files import write_json_atomic
from pipeline.runfile import RunFile
from pipeline.spec import ConfigError, StageRun
from pipeline.stage import StageContext, StageOutput
from slurm.node.publish import publish_results
from slurm.node.rendezvous import Launch, in_slurm_job, join_rendezvous
from slurm.node.requeue import RequeueError, requeue_job
from slurm.node.signals import LEAD_SECONDS_VARIABLE, StopSignals
from slurm.node.watchdog import JobControl, Reactions, Watchdog
from slurm.shared.logs import FILE_ONLY, log_path, start_logging

logger = logging.getLogger("slurm.node.job")  # also when it is run as `__main__`
EXIT_INTERRUPTED = 75  # exit code, EX_TEMPFAIL
EXIT_HUNG = 70
_REPEATABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    AssertionError,
    NotImplementedError,
)


class MissingInputError(RuntimeError):
    """A run cannot start: an input is not there."""


@dataclass(frozen=True)
class RankContext:
    """One rank's part in one attempt."""

    file: RunFile
    run_dir: Path
    attempt: int
    launch: Launch
    log: Path


def run_job(run_dir: Path) -> None:
    """Run one stage run on this rank; rank 0 records rows and then the manifest entry, last.

    A failure is noted in the attempt's record and raised again; so is an interruption, after which a job of Slurm
    does not come back from here: rank 0 requeues it. Nothing happens when the run is done already.
    """
    with StopSignals(ignore_repeats=in_slurm_job()) as signals:
        try:
            signals.unblock()
            _run_stage(run_dir, signals)
        except Interrupted as interrupted:
            logger.info("interrupted: %s", interrupted)
            if in_slurm_job():
                _exit_interrupted(signals)
            raise


def _run_stage(run_dir: Path, signals: StopSignals) -> None:
    launch = join_rendezvous(run_dir)
    provenance.check_one_root()
    file, run_root = runfile.read(run_dir), run_dir.parents[1]
    if manifest.find_done(run_root, file.run_id) is not None:
        logger.info("%s is done already", run_dir.name)
        return
    attempt = _take_attempt(run_dir, launch)
    place = RankContext(file, run_dir, attempt, launch, log_path(run_dir, attempt, launch.rank))
    start_logging(place.log, screen=launch.rank == 0)
    control = JobControl(run_dir, attempt, signals)
    try:
        with _with_watchdog(place, control):
            _run_attempt(place, run_root, control)
    except Interrupted as interrupted:
        if launch.rank == 0:
            attempts.record_interruption(run_dir, attempt, str(interrupted))
        raise
    except Exception as error:
        if signals.warned:  # another rank left first, this one met a closed connection
            logger.info(
                "%s: %s, after the warning: counts as interrupted", type(error).__name__, error
            )
            raise Interrupted(f"{signals.name}, then {type(error).__name__}: {error}") from error
        _note_failure(place, control, error)
        raise


def _note_failure(place: RankContext, control: JobControl, error: Exception) -> None:
    kind = type(error).__name__
    line = f"{kind}: {error}".strip().splitlines()[0]
    where = f"attempt {place.attempt}, rank {place.launch.rank}"
    logger.error("%s failed in %s: %s: %s", place.run_dir.name, where, kind, error)
    logger.error("raised at", exc_info=True, extra={FILE_ONLY: True})
    repeatable = isinstance(error, (ConfigError, MissingInputError, *_REPEATABLE))
    _fail(place, control, line, repeatable=repeatable)


def _fail(place: RankContext, control: JobControl, line: str, *, repeatable: bool = False) -> None:
    where: dict[str, Any] = {"log": place.log, "step": control.step, "host": socket.gethostname()}
    attempts.record_failure(
        place.run_dir, place.attempt, error=line, repeatable=repeatable, **where
    )


@contextmanager
def _with_watchdog(place: RankContext, control: JobControl) -> Iterator[None]:
    """With a guard that ends a rank which hangs or is out of date, and requeues the job when the loop is too slow."""
    launch, resources = place.launch, place.file.resources
    lead_s = float(os.environ.get(LEAD_SECONDS_VARIABLE, "120"))
    reactions = Reactions(
        grace_s=lead_s - 60 if lead_s >= 120 else lead_s / 2,
        hang_s=60 * float(resources.get("hang_minutes", 30)),
        on_hang=partial(_on_hang, place, control),
        on_grace_expired=partial(_on_grace_expired, launch.job_id)
        if launch.job_id and launch.rank == 0
        else None,
        on_superseded=partial(_on_superseded, place) if launch.rank == 0 else None,
    )
    with place.log.open("a", encoding="utf-8") as log:
        guard = Watchdog(control, reactions, log)
        guard.start()
        try:
            yield
        finally:
            guard.end()


def _on_hang(place: RankContext, control: JobControl, seconds: float) -> None:
    line = f"hung: no step for {seconds / 60:.1f} minutes after step {control.step}, rank {place.launch.rank}"
    logger.error("%s; where each thread is stands in %s", line, place.log)
    _fail(place, control, line)
    _exit(EXIT_HUNG)


def _on_grace_expired(job_id: str) -> None:
    logger.warning(
        "no step boundary in time: job %s is requeued as it is, to go on from the last checkpoint",
        job_id,
    )
    requeue_job(job_id)


def _on_superseded(place: RankContext) -> None:
    logger.error(
        "attempt %d of %s is not the newest any more: it ends", place.attempt, place.run_dir.name
    )
    _exit(EXIT_INTERRUPTED)


def _exit_interrupted(signals: StopSignals) -> NoReturn:
    """Rank 0 requeues the job, the others wait until Slurm ends them: an exit code of theirs would end it as failed.

    A SIGTERM that met no loop may also come from srun, because another rank died: then the batch script decides.
    """
    if os.environ.get("SLURM_PROCID", "0") == "0":
        if not signals.warned and not signals.saved:
            _exit(EXIT_INTERRUPTED)
        try:
            requeue_job(os.environ["SLURM_JOB_ID"])
        except RequeueError as error:
            logger.error("%s; submit again to go on from the last checkpoint", error)
            _exit(1)
        _exit(EXIT_INTERRUPTED)
    while not signals.got_sigterm:
        time.sleep(0.5)
    _exit(0)


def _exit(code: int) -> NoReturn:
    """End at once: no destructor, thread or exit handler can hold up what is over."""
    logging.shutdown()
    os._exit(code)


def _take_attempt(run_dir: Path, launch: Launch) -> int:
    if launch.rank != 0:
        return attempts.find_attempt(run_dir, launch.key)
    return attempts.start_attempt(
        run_dir, launch=launch.key, job_id=launch.job_id, ranks=launch.world_size
    )


def _run_attempt(place: RankContext, run_root: Path, control: JobControl) -> None:
    run, launch = place.file.build(), place.launch
    inputs, running = _inputs(run, run_root)
    facts = provenance.collect_provenance()
    if launch.rank == 0:
        write_json_atomic(place.run_dir / "provenance.json", facts)
    context = StageContext(
        run.stage, run.name, run.run_id, place.run_dir, inputs, place.attempt, control, running
    )
    logger.info("%s: attempt %d, %d ranks", run.key, place.attempt, launch.world_size)
    output = runfile.resolve(run.entrypoint)(context, run.config)
    if not isinstance(output, StageOutput):
        raise TypeError(f"{run.entrypoint} returned {type(output).__name__}, expected StageOutput")
    if launch.rank == 0:
        publish_results(
            run, place.run_dir, output, attempt=place.attempt, ranks=launch.world_size, facts=facts
        )
        logger.info("%s is done", run.key)


def _inputs(
    run: StageRun, run_root: Path
) -> tuple[dict[str, manifest.ManifestEntry], dict[str, Path]]:
    """Inputs that are done, and the folders of those that may still run."""
    inputs, running = {}, {}
    for role, run_id in run.needs.items():
        entry = manifest.find_done(run_root, run_id)
        if entry is not None:
            inputs[role] = entry
        elif run_id in run.watched and (folder := runfile.find(run_root, run_id)) is not None:
            running[role] = folder
        else:
            raise MissingInputError(
                f"input {role!r} of {run.key}: run {run_id} is not done in {run_root}/manifest"
            )
    return inputs, running


def main(arguments: list[str]) -> int:
    """Command line of a rank: `RUN_DIR`; returns the exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m slurm.node.job RUN_DIR\n")
        return 2
    try:
        run_job(Path(arguments[0]).absolute())
    except Interrupted:
        return EXIT_INTERRUPTED
    except Exception:
        if not logging.getLogger().handlers:
            logging.getLogger(__name__).exception("%s could not start", arguments[0])
        return 1
    return 0


if __name__ == "__main__":
    if code := main(sys.argv[1:]):
        sys.stdout.flush()
        _exit(code)
