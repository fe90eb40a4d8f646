"""What Slurm knows about our jobs; every question has an answer also where there is no Slurm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.spec import StageRun

JOB_PREFIX = "mugs-"
JOB_NOTE = "job.json"  # in a run's folder: the id of its newest job
SCRIPT = "submission.sh"  # in a run's folder: the batch script of its newest job
NEVER_SATISFIED = "DependencyNeverSatisfied"
_STRIPPED = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MUGS_LAUNCH")
_TIMEOUT_S = 60
_GONE = ("Invalid job id", "already completing or completed")  # scancel about a job that has ended


class SlurmError(RuntimeError):
    """A Slurm command failed where its answer is needed."""


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue: pending, running or ending. `parents`: ids of jobs that it still waits for."""

    job_id: str
    name: str
    state: str
    reason: str
    parents: tuple[str, ...] = ()
    script: str = ""

    @property
    def can_run(self) -> bool:
        """Whether it has run, runs or can still run: not so when a job it waits for failed."""
        return not (self.state == "PENDING" and self.reason == NEVER_SATISFIED)

    def belongs_to(self, run_dir: Path) -> bool:
        """Whether it is of this run here: another run root may hold a run of the same id."""
        return (
            self.script in ("", "(null)")
            or Path(self.script).resolve() == (run_dir / SCRIPT).resolve()
        )


def job_name(run_id: str) -> str:
    """Name under which the queue is asked about a run."""
    return f"{JOB_PREFIX}{run_id}"


def is_slurm_available() -> bool:
    """Whether Slurm's commands are there."""
    return shutil.which("squeue") is not None and shutil.which("sbatch") is not None


def clean_environment() -> dict[str, str]:
    """Without what an interactive job or a launcher left in the environment, which sbatch would pass on."""
    left = {key for key in os.environ if key.startswith(_STRIPPED) and key != "SLURM_CONF"}
    return {
        key: value
        for key, value in os.environ.items()
        if key not in left and key not in _RENDEZVOUS
    }


def _call(*command: str, environment: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment
        )
    except FileNotFoundError:
        return 127, "", f"{command[0]}: not found"
    except subprocess.TimeoutExpired:
        return 124, "", f"{command[0]}: no answer in {_TIMEOUT_S} s"
    return done.returncode, done.stdout, done.stderr


def find_jobs(
    runs: Iterable[StageRun], run_root: Path, *, required: bool = False
) -> dict[str, list[QueuedJob]]:
    """Jobs of these runs in the queue, whoever queued them, by run id.

    `required` raises SlurmError when the queue cannot be asked, else there are none then.
    """
    by_name = {job_name(run.run_id): run for run in runs}
    if not by_name or (not is_slurm_available() and not required):
        return {}
    jobs: dict[str, list[QueuedJob]] = {}
    for job in _ask(by_name, required=required):
        run = by_name[job.name]
        if job.belongs_to(run.run_dir(run_root)):
            jobs.setdefault(run.run_id, []).append(job)
    return jobs


def find_jobs_by_run_id(run_ids: Iterable[str]) -> dict[str, QueuedJob]:
    """Jobs in the queue of runs of these ids, in whatever run root. Raises SlurmError when it cannot be asked."""
    by_name = {job_name(run_id): run_id for run_id in run_ids}
    return {by_name[job.name]: job for job in _ask(by_name, required=True)} if by_name else {}


def _ask(names: Collection[str], *, required: bool) -> list[QueuedJob]:
    """Jobs of these names."""
    code, out, err = _call("squeue", "-h", f"--name={','.join(names)}", "-o", "%i|%j|%T|%r|%E|%o")
    if code != 0:
        if required:
            last = (err or out).strip().splitlines()[-1:]
            raise SlurmError(f"cannot ask the queue: {' '.join(last) or f'squeue exit {code}'}")
        return []
    jobs = []
    for line in out.splitlines():
        parts = line.strip().split("|", 5)
        if len(parts) == 6 and parts[1] in names:
            job_id, name, state, reason, dependency, script = parts
            jobs.append(QueuedJob(job_id, name, state, reason, _parents(dependency), script))
    return jobs


def _parents(dependency: str) -> tuple[str, ...]:
    """`afterok:41(unfulfilled),singleton(unfulfilled)` -> ("41",)."""
    parts = [part for part in dependency.split(",") if part.startswith("after")]
    return tuple(number for part in parts for number in re.findall(r"(?<=:)\d+", part))


def submit_script(script: Path) -> str:
    """Queue a batch script; the id of the job. SlurmError when Slurm refuses."""
    code, out, err = _call("sbatch", "--parsable", str(script), environment=clean_environment())
    if code != 0 or not out.strip():
        raise SlurmError(f"sbatch {script}: {(err or out).strip() or f'exit {code}'}")
    return out.strip().splitlines()[-1].split(";")[0]


def cancel_jobs(job_ids: Iterable[str]) -> None:
    """Cancel jobs; ones that are gone already are fine. SlurmError when Slurm refuses."""
    ids = list(job_ids)
    code, _, err = _call("scancel", *ids) if ids else (0, "", "")
    refusals = [line for line in err.splitlines() if not any(words in line for words in _GONE)]
    if code != 0 and refusals:
        raise SlurmError(f"cannot cancel {' '.join(ids)}: {refusals[0]}")


def parse_scontrol(line: str) -> dict[str, str]:
    """A line of `scontrol -o show`: `JobId=3 JobState=RUNNING ...`."""
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


def query_job_state(job_id: str) -> str | None:
    """State of a job by `scontrol`, or by `sacct` once Slurm has forgotten it; None when nobody knows."""
    code, out, _ = _call("scontrol", "-o", "show", "job", job_id)
    if code == 0 and (state := parse_scontrol(out).get("JobState")):
        return state
    code, out, _ = _call("sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State")
    return out.split()[0] if code == 0 and out.split() else None


def query_node_address(host: str) -> str | None:
    """Address of a node as Slurm knows it, for names that do not resolve."""
    code, out, _ = _call("scontrol", "-o", "show", "node", host)
    return parse_scontrol(out).get("NodeAddr") if code == 0 else None


def list_partitions() -> dict[str, str]:
    """Names of the partitions with their states. SlurmError when the cluster does not answer."""
    code, out, err = _call("scontrol", "-o", "show", "partition")
    if code != 0:
        raise SlurmError((err or out).strip() or f"scontrol exit {code}")
    found = [parse_scontrol(line) for line in out.splitlines()]
    return {
        each["PartitionName"]: each.get("State", "?") for each in found if "PartitionName" in each
    }


def list_accounts(user: str) -> list[str]:
    """Accounts of a user; none where the cluster keeps none or does not tell."""
    code, out, _ = _call(
        "sacctmgr", "-n", "-P", "show", "associations", f"user={user}", "format=Account"
    )
    return sorted(set(out.split())) if code == 0 else []


def dry_run_script(script: Path) -> tuple[bool, str]:
    """Whether Slurm would take a batch script, and what it says; nothing is queued."""
    code, out, err = _call("sbatch", "--test-only", str(script), environment=clean_environment())
    said = (err or out).strip().splitlines()
    return code == 0, said[-1].removeprefix("sbatch: ").removeprefix(
        "error: "
    ) if said else f"exit code {code}"
