"""The job: one stage run, on every rank, under Slurm, torchrun or the local executor.

`python -m slurm.job RUN_DIR` is the command of the last two. The pickle of the first holds two texts; all
else is read from the run's folder, so a requeued job starts from what is on disk then.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from pipeline import attempts, manifest, provenance, runfile
from pipeline.atomic import write_json_atomic
from pipeline.spec import StageContext, StageOutput, StageRun
from slurm.environment import Launch, enter

logger = logging.getLogger("slurm.job")  # also when it is run as `__main__`
FILE_ONLY = "file_only"  # attribute of a log record that does not go to the screen


class StageError(RuntimeError):
    """A run cannot start: an input is not there."""


@dataclass(frozen=True)
class StageJob:
    """Pickled callable that submitit runs on every rank."""

    run_dir: str
    entrypoint: str

    def __call__(self) -> str:
        """Run the stage; returns the run's folder. Truth is the manifest entry, not this value."""
        run_stage(Path(self.run_dir), self.entrypoint)
        return self.run_dir

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What to run after a requeue: the same, since state is on disk."""
        return submitit.helpers.DelayedSubmission(self)


def run_stage(run_dir: Path, entrypoint: str | None = None) -> None:
    """Run one stage run on this rank; rank 0 records rows and then the manifest entry, last.

    A failure is noted in the attempt's record and raised again. Nothing happens when the run is done already.
    """
    launch = enter(run_dir)
    provenance.check_one_root()
    run_root = run_dir.parents[1]
    if manifest.find_done(run_root, runfile.read(run_dir).run_id) is not None:
        logger.info("%s is done already", run_dir.name)
        return
    attempt = _take_attempt(run_dir, launch)
    log = _start_logging(run_dir, attempt, launch.rank)
    try:
        _attempt(run_dir, run_root, attempt, launch, entrypoint)
    except Exception as error:
        kind = type(error).__name__
        line = f"{kind}: {error}".strip().splitlines()[0]
        logger.error("%s failed in attempt %d, rank %d: %s: %s", run_dir.name, attempt, launch.rank, kind, error)
        logger.error("raised at", exc_info=True, extra={FILE_ONLY: True})
        attempts.fail(run_dir, attempt, error=line, log=log)
        raise


def _take_attempt(run_dir: Path, launch: Launch) -> int:
    if launch.rank != 0:
        return attempts.find(run_dir, launch.key)
    return attempts.start(run_dir, launch=launch.key, job_id=launch.job_id, ranks=launch.world_size)


def _attempt(run_dir: Path, run_root: Path, attempt: int, launch: Launch, entrypoint: str | None) -> None:
    run = runfile.read(run_dir).build()
    inputs = {}
    for role, run_id in run.needs.items():
        entry = manifest.find_done(run_root, run_id)
        if entry is None:
            raise StageError(f"input {role!r} of {run.key}: run {run_id} is not done in {run_root}/manifest")
        inputs[role] = entry
    facts = provenance.collect()
    if launch.rank == 0:
        write_json_atomic(run_dir / "provenance.json", facts)
    context = StageContext(run.stage, run.name, run.run_id, run_dir, inputs, attempt)
    logger.info("%s: attempt %d, %d ranks", run.key, attempt, launch.world_size)
    output = runfile.resolve(entrypoint or run.entrypoint)(context, run.config)
    if not isinstance(output, StageOutput):
        raise TypeError(f"{run.entrypoint} returned {type(output).__name__}, expected StageOutput")
    if launch.rank == 0:
        _publish(run, run_root, output, attempt, launch, facts)
        logger.info("%s is done", run.key)


def _publish(
    run: StageRun, run_root: Path, output: StageOutput, attempt: int, launch: Launch, facts: dict[str, Any]
) -> None:
    run_dir = run.run_dir(run_root)
    if not attempts.is_current(run_dir, attempt):
        raise attempts.StaleAttemptError(f"{run_dir}: attempt {attempt} is not the newest, it may not publish")
    rows = None
    if output.rows:
        path = run_dir / "rows.csv"
        runfile.resolve(run.rows_writer)(path, list(output.rows))
        rows = path.relative_to(run_root).as_posix()
    described = {k: manifest.describe_output(run_root, run_dir / v) for k, v in output.outputs.items()}
    gpus = run.resources.gpus if (devices := provenance.devices()) else 0
    seconds = _seconds(run_dir, attempt)
    entry = manifest.ManifestEntry(
        stage=run.stage,
        name=run.name,
        run_id=run.run_id,
        upstream=dict(run.needs),
        config=run.config.model_dump(mode="json"),
        outputs=described,
        rows=rows,
        info=dict(output.info),
        provenance=facts,
        attempt=attempt,
        restarts=len(attempts.numbers(run_dir)) - 1,
        device=devices[0] if devices else "cpu",
        ranks=launch.world_size,
        gpus=gpus,
        seconds=round(seconds, 3),
        gpu_hours=round(gpus * seconds / 3600, 4),
        finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    manifest.record(run_root, entry)


def _seconds(run_dir: Path, attempt: int) -> float:
    """Running time of all attempts: earlier ones from their start to their last log line."""
    total = 0.0
    for number in attempts.numbers(run_dir):
        began = float((attempts.describe(run_dir, number) or {}).get("time", 0.0))
        log = log_path(run_dir, number, 0)
        ended = time.time() if number == attempt else log.stat().st_mtime if log.exists() else began
        total += max(0.0, ended - began) if began else 0.0
    return total


def log_path(run_dir: Path, attempt: int, rank: int) -> Path:
    """Log file of one rank in one attempt."""
    return run_dir / "logs" / f"attempt_{attempt:04d}_rank{rank}.log"


def _start_logging(run_dir: Path, attempt: int, rank: int) -> Path:
    path = log_path(run_dir, attempt, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handlers: list[logging.Handler] = [logging.FileHandler(path, encoding="utf-8")]
    if rank == 0:
        screen = logging.StreamHandler(sys.stdout)
        screen.addFilter(lambda record: not hasattr(record, FILE_ONLY))
        handlers.append(screen)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(os.environ.get("MUGS_LOG_LEVEL", "INFO").upper())
    logging.captureWarnings(True)
    return path


def main(arguments: list[str]) -> int:
    """Command line of a local rank: `RUN_DIR`; 0 when the run is done, 1 when it failed."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m slurm.job RUN_DIR\n")
        return 2
    try:
        run_stage(Path(arguments[0]).absolute())
    except Exception:
        if not logging.getLogger().handlers:
            logging.getLogger(__name__).exception("%s could not start", arguments[0])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
