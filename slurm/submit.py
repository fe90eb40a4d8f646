"""Stage runs onto a cluster: one job per pending run, chained; submitting again changes nothing."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit

from pipeline import manifest, runfile
from pipeline.atomic import write_json_atomic, write_text_atomic
from pipeline.spec import ConfigError, StageRun
from slurm import queue, snapshot
from slurm.cluster import ClusterProfile, check_fit, job_command, sbatch_parameters

_STRIPPED = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MUGS_LAUNCH")


@dataclass(frozen=True)
class Submission:
    """What became of one run: `action` is done | queued (as it was) | submitted."""

    run: StageRun
    action: str
    job_id: str | None = None


def submit(runs: Sequence[StageRun], profile: ClusterProfile) -> list[Submission]:
    """Queue the runs that are neither done nor queued, in the given (topological) order.

    A job whose input failed, or is submitted anew here, can never run as it was queued: it is replaced.
    ConfigError when a run does not fit the cluster or needs one that is neither done nor in `runs`.
    """
    root = profile.run_root
    for run in runs:
        check_fit(profile, run.name, run.resources)
    done = manifest.split(root, runs).done
    jobs = queue.queued(required=True)
    code: Path | None = None
    new: set[str] = set()
    waits: dict[str, str] = {}
    result = []
    for run in runs:
        if run.run_id in done:
            result.append(Submission(run, "done"))
            continue
        _check_inputs(root, run, waits)
        mine = jobs.get(queue.job_name(run.run_id), [])
        stale = [job for job in mine if not job.alive or new & set(run.needs.values())]
        queue.cancel(job.job_id for job in stale)
        alive = [job for job in mine if job not in stale]
        if alive:
            waits[run.run_id] = alive[-1].job_id
            result.append(Submission(run, "queued", alive[-1].job_id))
            continue
        code = code or snapshot.take(root)
        parents = [waits[need] for need in run.needs.values() if need in waits]
        waits[run.run_id] = _submit_one(run, profile, parents, code)
        new.add(run.run_id)
        result.append(Submission(run, "submitted", waits[run.run_id]))
    return result


def _check_inputs(root: Path, run: StageRun, waits: dict[str, str]) -> None:
    for role, need in run.needs.items():
        if need not in waits and manifest.find_done(root, need) is None:
            raise ConfigError(f"{run.name}: its input {role!r} (run {need}) is not done; submit it too")


def _submit_one(run: StageRun, profile: ClusterProfile, parents: Sequence[str], code: Path) -> str:
    run_dir = runfile.write(profile.run_root, run)
    (run_dir / "logs").mkdir(exist_ok=True)
    script = run_dir / queue.SCRIPT
    write_text_atomic(script, sbatch_text(run, profile, parents, code))
    with clean_environment():
        job_id = queue.sbatch(script)
    write_json_atomic(run_dir / queue.JOB_NOTE, {"job_id": job_id, "time": time.time(), "code": str(code)})
    return job_id


def sbatch_text(run: StageRun, profile: ClusterProfile, parents: Sequence[str], code: Path) -> str:
    """The batch script of one run, made by submitit; `parents` are ids of jobs it must wait for.

    `singleton` keeps a second job of the same run, queued elsewhere meanwhile, from running beside it. The command is
    a plain one, not a pickle, so that a job is whole once sbatch has it, whatever becomes of the submission.
    """
    run_dir = run.run_dir(profile.run_root)
    built = submitit.SlurmExecutor(run_dir / "logs")
    waits = ([f"afterok:{':'.join(parents)}"] if parents else []) + ["singleton"]
    parameters = sbatch_parameters(profile, run.resources, code=code)
    name = queue.job_name(run.run_id)
    built.update_parameters(**parameters, job_name=name, dependency=",".join(waits))
    return str(built._make_submission_file_text(job_command(profile, run_dir), "job"))


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """Without what an interactive job or a launcher left in the environment, which sbatch would pass on."""
    saved = dict(os.environ)
    try:
        for key in saved:
            if (key.startswith(_STRIPPED) and key != "SLURM_CONF") or key in _RENDEZVOUS:
                del os.environ[key]
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)
