"""Run one stage on one rank of a job, under Slurm, torchrun or the local executor.

All three start `python -m slurm.node.job RUN_DIR` on every rank. Everything else is read from the
run's folder, so a requeued job starts from what is on disk at that time:

    submission.sh (batch script) -> srun -> this module -> RUN_DIR/config.yaml -> `run` of the stage

Exit codes: 0 done, 1 failed, 70 hung, 75 interrupted (the next attempt resumes).
"""

import signal

# By default both signals kill, and what is imported below takes longer than a warning of Slurm may
# take to arrive. So they are held back at once; `StopSignals.unblock` lets them through. A rank
# that is killed before this line has done nothing yet, and the batch script requeues the job.
if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pipeline import attempts, machine, manifest, provenance, runfile
from pipeline.control import Interrupted
from pipeline.files import open_to_append
from pipeline.inputs import check_unchanged, note_earlier_inputs, record_inputs
from pipeline.ownership import check_mine, keep_others_from_writing
from pipeline.runfile import RunFile
from pipeline.spec import StageRun
from pipeline.stage import StageContext, StageOutput
from slurm.node.compile_cache import compile_cache
from slurm.node.energy import EnergyMeter, wait_for_ranks
from slurm.node.publish import publish_results
from slurm.node.rendezvous import Launch, in_slurm_job, join_rendezvous
from slurm.node.requeue import RequeueError, read_job, requeue_job
from slurm.node.signals import LEAD_SECONDS_VARIABLE, StopSignals
from slurm.node.staging import staged_inputs
from slurm.node.time_limit import why_not_resume
from slurm.node.watchdog import JobControl, Watchdog
from slurm.shared import queue
from slurm.shared.costs import count_gpus_here
from slurm.shared.exit_codes import EXIT_HUNG, EXIT_INTERRUPTED
from slurm.shared.logs import FILE_ONLY, log_path, start_logging

logger = logging.getLogger("slurm.node.job")  # `__name__` is "__main__" under `python -m`


class MissingInputError(RuntimeError):
    """A run cannot start because one of its inputs is not there."""


class NoGpuError(RuntimeError):
    """A rank sees no GPU, or fewer than Slurm gave the job: the node is broken."""


# Errors in code, configuration or inputs: the next attempt would meet the same error, so the job is
# not retried. Other errors may pass: RuntimeError includes CUDA and NCCL errors, OSError the file
# system.
_REPEATABLE = (
    MissingInputError,
    ValueError,  # and with it ConfigError
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    AssertionError,
    NotImplementedError,
)

# So soon after a job went on, an error may come of its suspension.
_AFTER_SUSPENSION_S = 120.0


@dataclass(frozen=True)
class RankContext:
    """One rank's part in one attempt."""

    run_file: RunFile
    launch: Launch
    control: JobControl
    log: Path
    # None for runs without GPUs.
    energy: EnergyMeter | None = None

    def record_energy(self) -> None:
        """Record what this rank's GPU took so far, once."""
        if self.energy is not None:
            self.energy.record(self.control.run_dir, self.control.attempt, self.launch.rank)


def run_job(run_dir: Path, run_file_sha256: str | None = None) -> None:
    """Run one stage on this rank. Rank 0 then writes the result rows and, last, the manifest entry.

    `run_file_sha256` is the checksum of the run file that the job was submitted with.

    Does nothing if the run is done already. A failure or an interruption is recorded in the attempt
    and raised again. An interrupted Slurm job does not return from here: rank 0 requeues it.
    """
    with StopSignals(ignore_repeats=in_slurm_job()) as signals:
        try:
            signals.unblock()
            _run_rank(run_dir, run_file_sha256, signals)
        except Interrupted as interrupted:
            logger.info("interrupted: %s", interrupted)
            if in_slurm_job():
                _exit_interrupted(run_dir, signals)
            raise


def _run_rank(run_dir: Path, run_file_sha256: str | None, signals: StopSignals) -> None:
    launch = join_rendezvous()
    provenance.check_one_root()
    for path in (run_dir, run_dir / runfile.FILE_NAME):
        check_mine(path, runfile.FOREIGN_REMEDY)
    run_file = runfile.read_run_file(run_dir, run_file_sha256)
    if manifest.find_done(run_dir.parents[1], run_file.run_id) is not None:
        logger.info("%s is done already", run_dir.name)
        return

    # Rank 0 takes the attempt number; the other ranks find it by the key that all ranks of a launch
    # share.
    if launch.rank == 0:
        has_gpus = run_file.resources.get("gpu", True) and (launch.job_id or count_gpus_here())
        attempt = attempts.start_attempt(
            run_dir,
            launch=launch.key,
            job_id=launch.job_id,
            ranks=launch.world_size,
            gpus=launch.world_size if has_gpus else 0,
        )
    else:
        attempt = attempts.find_attempt(run_dir, launch.key)
    log = log_path(run_dir, attempt, launch.rank)
    start_logging(log, screen=launch.rank == 0)

    meter = EnergyMeter() if run_file.resources.get("gpu", True) else None
    context = RankContext(run_file, launch, JobControl(run_dir, attempt, signals), log, meter)
    try:
        with _with_watchdog(context):
            _run_stage(context)
    except Interrupted as interrupted:
        if launch.rank == 0:
            attempts.record_interruption(run_dir, attempt, str(interrupted), saved=signals.saved)
        raise
    except Exception as error:
        _handle_error(context, error)
        raise
    finally:
        context.record_energy()


def _handle_error(context: RankContext, error: Exception) -> None:
    """Record why this rank failed.

    Raises:
        Interrupted: the error came of a warning or a suspension, and is no failure.
    """
    signals = context.control.signals
    kind = type(error).__name__
    if signals.warned:
        # After Slurm's warning another rank may exit first, and this rank then meets a closed
        # connection.
        logger.info("%s: %s; counts as interrupted, it came after the warning", kind, error)
        raise Interrupted(f"{signals.name}, then {kind}: {error}") from error
    run_dir = context.control.run_dir
    attempt = context.control.attempt
    if context.control.was_suspended(within_s=_AFTER_SUSPENSION_S):
        # Time goes on while a job is suspended, and its connections may be at an end.
        logger.info("%s: %s; counts as interrupted, the job was suspended", kind, error)
        reason = f"suspended, then {kind}: {error}"
        if context.launch.rank == 0:
            attempts.record_interruption(run_dir, attempt, reason)
        raise Interrupted(reason) from error
    where = f"attempt {attempt}, rank {context.launch.rank}"
    logger.error("%s failed in %s: %s: %s", run_dir.name, where, kind, error)
    logger.error("raised at", exc_info=True, extra={FILE_ONLY: True})
    _record_failure(
        context,
        f"{kind}: {error}".strip().splitlines()[0],
        repeatable=isinstance(error, _REPEATABLE),
    )


def _run_stage(context: RankContext) -> None:
    """Call the stage's `run` function on this rank and, on rank 0, publish what it returns."""
    control = context.control
    launch = context.launch
    run_dir = control.run_dir
    run = context.run_file.build()
    check_gpus(wanted=run.resources.gpu)
    inputs, running = _find_inputs(run, run_dir.parents[1])
    facts = provenance.collect_provenance()
    if launch.rank == 0:
        # Now, and not when the run ends: files may be replaced while it runs.
        facts["inputs"] = _record_inputs(run, run_dir, control.attempt)
        facts["environment"] = machine.describe_environment(run_dir / queue.SCRIPT)
        attempts.record_provenance(run_dir, control.attempt, facts)
        warn_of_other_code(run_dir)
    logger.info("%s: attempt %d, %d ranks", run.key, control.attempt, launch.world_size)

    stage_context = StageContext(
        run.stage, run.name, run.run_id, run_dir, inputs, control.attempt, control, running
    )
    with (
        compile_cache(run_dir, control.attempt, leads=launch.rank == 0),
        staged_inputs(inputs) as staged,
    ):
        stage_context = replace(stage_context, inputs=staged)
        output = runfile.import_by_name(run.entrypoint)(stage_context, run.config)
    context.record_energy()
    if not isinstance(output, StageOutput):
        raise TypeError(f"{run.entrypoint} returned {type(output).__name__}, expected StageOutput")
    if launch.rank == 0:
        # By now torch is loaded and its GPUs are known.
        facts["environment"] |= machine.describe_accelerator()
        attempts.record_provenance(run_dir, control.attempt, facts)
        check_unchanged(
            facts["inputs"],
            "it was replaced while the run read it, so nothing is recorded; start the run again",
        )
        wait_for_ranks(run_dir, control.attempt, launch.world_size)
        publish_results(
            run, run_dir, output, attempt=control.attempt, ranks=launch.world_size, facts=facts
        )
        logger.info("%s is done", run.key)


def check_gpus(*, wanted: bool) -> None:
    """Check that this rank of a Slurm job sees every GPU that Slurm gave it.

    Otherwise it would train on the CPUs, or share a GPU with another rank, until the time limit.
    The other ranks wait for it when they join the process group, so none of them begins.

    Raises:
        NoGpuError: the node is at fault; the job is started again on another one.
    """
    if not wanted or not in_slurm_job():
        return
    # As text: this package does not import torch, and stages that need no GPU need not either.
    seen = int(runfile.import_by_name("torch.cuda:device_count")())
    # Slurm lists the GPUs of the job here, or of the rank where it binds each to its own.
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if seen < max(1, len(given)):
        raise NoGpuError(
            f"torch sees {seen or 'no'} CUDA device{'' if seen == 1 else 's'} on "
            f"{slurm_node_name()}, Slurm gave {len(given) or 'at least 1'}"
        )


def slurm_node_name() -> str:
    """Return the name of this node as Slurm knows it; its host name may be a longer one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _record_inputs(run: StageRun, run_dir: Path, attempt: int) -> dict[str, Any]:
    """Return what the run reads; warn if an earlier attempt, whose work may be used, read another
    content.
    """
    inputs = record_inputs(run.config)
    before = [number for number in attempts.list_attempts(run_dir) if number < attempt]
    # Without a checkpoint, such as after data were repaired, nothing of that attempt is used.
    if before and any(run_dir.glob("checkpoints/step_*")):
        earlier = attempts.read_inputs(run_dir, before[-1])
        inputs = note_earlier_inputs(inputs, earlier, before[-1])
    for name, found in inputs.items():
        if "earlier" in found:
            logger.warning("%s: %s", name, found["earlier"])
    return inputs


def warn_of_other_code(run_dir: Path) -> None:
    """Log a warning if this attempt runs with other code or packages than the one before."""
    versions = attempts.list_code_versions(run_dir)
    if len(versions) < 2:
        return
    before, now = versions[-2:]
    changed = [
        f"{key} {before[key]} -> {now[key]}"
        for key in attempts.CODE_FACTS
        if before[key] != now[key]
    ]
    logger.warning(
        "other code or packages than in attempt %d: %s", before["attempt"], "; ".join(changed)
    )


def _find_inputs(
    run: StageRun, run_root: Path
) -> tuple[dict[str, manifest.ManifestEntry], dict[str, Path]]:
    """Return the inputs that are done, by role, and the folders of those that may still run."""
    inputs = {}
    running = {}
    for role, run_id in run.needs.items():
        entry = manifest.find_done(run_root, run_id)
        if entry is not None:
            inputs[role] = entry
        elif (
            run_id in run.watched and (folder := runfile.find_run_dir(run_root, run_id)) is not None
        ):
            running[role] = folder
        else:
            raise MissingInputError(
                f"input {role!r} of {run.key}: run {run_id} is not done in {run_root}/manifest; "
                "run or submit it first"
            )
    return inputs, running


def _record_failure(context: RankContext, line: str, *, repeatable: bool = False) -> None:
    control = context.control
    attempts.record_failure(
        control.run_dir,
        control.attempt,
        error=line,
        log=context.log,
        step=control.step,
        host=slurm_node_name(),
        repeatable=repeatable,
    )


@contextmanager
def _with_watchdog(context: RankContext) -> Iterator[None]:
    """Watch this rank while the block runs.

    A rank that hangs or is superseded is ended; a job that does not stop in time is requeued.
    """
    job_id = context.launch.job_id
    leads = context.launch.rank == 0  # one rank speaks for the job
    lead_s = float(os.environ.get(LEAD_SECONDS_VARIABLE, "120"))
    with (
        open_to_append(context.log) as log,
        Watchdog(
            control=context.control,
            log=log,
            # Of the lead time, 30 s are kept for a warning that comes late and 30 s for the requeue
            # itself.
            grace_s=lead_s - 60 if lead_s >= 120 else lead_s / 2,
            hang_s=60 * float(context.run_file.resources.get("hang_minutes", 30)),
            on_hang=partial(_on_hang, context),
            on_grace_expired=partial(_on_grace_expired, context) if leads and job_id else None,
            on_superseded=partial(_on_superseded, context) if leads else None,
        ),
    ):
        yield


def _on_hang(context: RankContext, seconds: float) -> None:
    line = (
        f"hung: no step for {seconds / 60:.1f} minutes after step {context.control.step}, "
        f"rank {context.launch.rank}"
    )
    logger.error("%s; the stack of each thread is in %s", line, context.log)
    _record_failure(context, line)
    _exit(EXIT_HUNG)


def _on_grace_expired(context: RankContext) -> None:
    run_dir = context.control.run_dir
    logger.warning("no step boundary in time: stop unsaved, resume from the last checkpoint")
    reason = f"{signal.SIGUSR2.name}, no step boundary in time"
    attempts.record_interruption(run_dir, context.control.attempt, reason)
    if not _requeue_from_rank(run_dir):
        _exit(EXIT_INTERRUPTED)


def _on_superseded(context: RankContext) -> None:
    logger.error(
        "a newer attempt of %s has started: attempt %d ends",
        context.control.run_dir.name,
        context.control.attempt,
    )
    _exit(EXIT_INTERRUPTED)


def _requeue_from_rank(run_dir: Path) -> bool:
    """Requeue the job on rank 0. Return False where the batch script has to decide.

    It decides about a run that was canceled or that could not resume. It also requeues a job whose
    ranks cannot, as in a container without `scontrol`.
    """
    job_id = os.environ["SLURM_JOB_ID"]
    try:
        job, _ = read_job(job_id)
        if queue.is_canceled(run_dir, job_id) or why_not_resume(
            run_dir, attempts.latest_attempt(run_dir), job
        ):
            return False
        requeue_job(job_id)
    except RequeueError as error:
        logger.warning("%s; left to the batch script", error)
        return False
    return True


def _exit_interrupted(run_dir: Path, signals: StopSignals) -> NoReturn:
    """Requeue the job on rank 0; on other ranks, wait until Slurm ends them.

    If another rank exited first with an error, srun would end the job as failed before rank 0 has
    requeued it.
    """
    if os.environ.get("SLURM_PROCID", "0") == "0":
        # srun sends SIGTERM too, when another rank has died. The end of the batch script then
        # decides.
        if signals.warned or signals.saved:
            _requeue_from_rank(run_dir)
        _exit(EXIT_INTERRUPTED)
    while not signals.got_sigterm:
        time.sleep(0.5)
    _exit(0)


def _exit(code: int) -> NoReturn:
    """End the process at once, so that no destructor, thread or exit handler can delay the end."""
    logging.shutdown()
    os._exit(code)


def main(arguments: list[str]) -> int:
    """Run the command line of a rank, `RUN_DIR [SHA256]`, and return the exit code."""
    if len(arguments) not in (1, 2):
        sys.stderr.write("usage: python -m slurm.node.job RUN_DIR [SHA256 OF THE RUN FILE]\n")
        return 2
    keep_others_from_writing()
    try:
        run_job(Path(arguments[0]).absolute(), *arguments[1:])
    except Interrupted:
        return EXIT_INTERRUPTED
    except Exception:
        # Before the attempt has its log file, nobody else has reported the error.
        if not logging.getLogger().handlers:
            logging.getLogger(__name__).exception("%s could not start", arguments[0])
        return 1
    return 0


if __name__ == "__main__":
    if code := main(sys.argv[1:]):
        sys.stdout.flush()
        _exit(code)
