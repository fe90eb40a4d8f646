"""Slurm's commands: what it knows about our jobs, and what we ask it to do.

Every question has three answers: yes, no, and none at all. While the controller does not answer,
nothing may be concluded about a job, so these functions raise SlurmError then; they never answer
"there is no such job".
"""

import hashlib
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.files import read_json, write_json_atomic
from pipeline.ownership import describe_owner
from pipeline.spec import StageRun

logger = logging.getLogger(__name__)
_NAMES_LENGTH = 100_000  # of all names in one call; an argument of a command has at most 128 kB

JOB_PREFIX = "mugs-"
_SAID_LENGTH = 60  # of stage and run in the name of a job
JOB_NOTE = "job.json"  # in a run's folder: the id of its newest job
SCRIPT = "submission.sh"  # in a run's folder: the batch script of its newest job
CANCEL_NOTE = "canceled.json"  # in a run's folder: the id of the job that the user has canceled
_NOTE_FIELDS: dict[str, type] = {"job_id": str, "time": float}
_COMMENT_PREFIX = "mugs-run-dir="
NEVER_SATISFIED = "DependencyNeverSatisfied"
NO_NODE_FITS = "BadConstraints"
# Reasons of a pending job that waiting does not cure, with what does.
CANNOT_START = {
    NEVER_SATISFIED: "a run that it needs has failed: submit again",
    NO_NODE_FITS: "no node of the cluster fits: change constraint, gpu_type, nodelist, exclude or "
    "memory_gb of the profile, then submit again",
    "PartitionTimeLimit": "its time limit is longer than the partition allows: set max_hours of "
    "the profile, then submit again",
    "PartitionNodeLimit": "it asks for more nodes than the partition allows: change the run's "
    "resources or the partition, then submit again",
    "InvalidAccount": "the account is not valid: change account of the profile, then submit again",
    "InvalidQOS": "the QOS is not valid: change qos of the profile, then submit again",
    "AccountNotAllowed": "the partition takes no jobs of the account: change account or partition "
    "of the profile, then submit again",
    "QOSNotAllowed": "the partition takes no jobs of the QOS: change qos or partition of the "
    "profile, then submit again",
    "MaxMemPerLimit": "it asks for more memory than the partition allows: change memory_gb of the "
    "profile, then submit again",
}
# The same for reasons that come in many spellings, such as QOSMaxWallDurationPerJobLimit: they
# compare this one job with a limit, so no other job's end can help.
_CANNOT_START_WORDS = (("MaxWallDurationPerJob", CANNOT_START["PartitionTimeLimit"]),)
_LIMIT_PER_JOB = re.compile(r"(QOS|Assoc)Max\w+PerJob(Limit)?")
_HELD = ("JobHeldUser", "JobHeldAdmin", "JobHoldMaxRequeue")
# Variables of an interactive job or a launcher that sbatch would hand on to a new job.
_STRIPPED = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MUGS_LAUNCH")
_TIMEOUT_S = 60
COMMAND_NOT_FOUND = 127  # exit code of a shell
_UNKNOWN_JOB = "Invalid job id"
# How sbatch says that no more jobs of this user fit into the queue: AssocMaxSubmitJobLimit,
# QOSMaxSubmitJobPerUserLimit, QOSGrpSubmitJobsLimit and the like. The sentence that follows (`job
# submit limit, user's size and/or time limits`) also stands for other limits.
_QUEUE_FULL = re.compile(r"\b(Assoc|QOS)?(Max|Grp)SubmitJob\w*")
_GONE = (_UNKNOWN_JOB, "already completing or completed")  # scancel about a job that has ended


class SlurmError(RuntimeError):
    """A Slurm command failed, and its answer is needed."""


class NoAnswerError(SlurmError):
    """Slurm did not answer a question: the same command may work later."""


class QueueFullError(SlurmError):
    """Slurm takes no more jobs of this user until others of them have ended."""


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue: pending, running or ending. `parents`: ids of jobs it still waits for."""

    job_id: str
    name: str
    state: str
    reason: str
    parents: tuple[str, ...] = ()
    # `<script>|<comment>`: the comment names the run folder; before, the script did.
    origin: str = ""

    @property
    def can_run(self) -> bool:
        """Whether it runs or can still run: not so if it waits for what will never come."""
        return self.why_never == ""

    @property
    def why_never(self) -> str:
        """Why a pending job can never start, with what to do; "" if it may start."""
        if self.state != "PENDING":
            return ""
        if self.reason in CANNOT_START:
            return CANNOT_START[self.reason]
        for words, advice in _CANNOT_START_WORDS:
            if words in self.reason:
                return advice
        if _LIMIT_PER_JOB.fullmatch(self.reason):
            return "it asks for more than a limit allows one job: ask for less, then submit again"
        return ""

    @property
    def is_held(self) -> bool:
        """Whether somebody holds the job back, so that it starts only after a release."""
        return self.state == "PENDING" and self.reason in _HELD

    def belongs_to(self, run_dir: Path) -> bool:
        """Return whether it is of this run folder: another run root may hold the same run id."""
        script, _, comment = self.origin.partition(f"|{_COMMENT_PREFIX}")
        if comment:
            # Most paths have no links, and to look for some takes longer than all else about a job.
            return comment == str(run_dir) or f"{_COMMENT_PREFIX}{comment}" == comment_of(run_dir)
        script = script.removesuffix("|(null)").removesuffix("|")
        if not script.endswith(f"/{SCRIPT}"):
            return True  # Slurm does not tell, so be careful and count it
        return os.path.realpath(script) == os.path.realpath(run_dir / SCRIPT)


def comment_of(run_dir: Path) -> str:
    """Return the comment of a run's jobs, which tells run roots apart."""
    # Unlike Path.resolve, this raises nothing for links that lead to each other.
    return f"{_COMMENT_PREFIX}{_resolve(run_dir)}"


def _resolve(run_dir: Path) -> str:
    """Return what os.path.realpath does, with one system call for each of a stage's runs."""
    if run_dir.is_symlink() or not run_dir.is_absolute():
        return os.path.realpath(run_dir)
    stage_folder, name = os.path.split(run_dir)
    return f"{_resolve_stage(stage_folder)}/{name}"


@cache
def _resolve_stage(folder: str) -> str:
    return os.path.realpath(folder)


def job_name(run_dir: Path) -> str:
    """Return the name of a run's jobs, such as `mugs-pretrain-6928-1c40f7`.

    It says run and stage (once, if the run's name has it) and how the run's id begins. The queue is
    asked by this name, and Slurm runs one job of a name at a time (`singleton`). So the last part
    tells run folders apart: the same run in another run root has another name.
    """
    # As text: it is asked of each of thousands of runs.
    stage_folder, key = os.path.split(run_dir)
    name, _, run_id = key.rpartition("-")
    stage = os.path.basename(stage_folder)
    said = name if stage in name else f"{stage}-{name}"
    place = hashlib.sha256(os.fsencode(_resolve(run_dir))).hexdigest()
    return f"{JOB_PREFIX}{said[:_SAID_LENGTH]}-{run_id[:4]}-{place[:6]}"


def list_job_names(run_dir: Path) -> tuple[str, str]:
    """Return the names that a run's jobs may have: today's, and that of earlier versions."""
    return job_name(run_dir), f"{JOB_PREFIX}{run_dir.name.rpartition('-')[2]}"


def clean_environment() -> dict[str, str]:
    """Return the environment without what sbatch would hand on from another job or a launcher."""
    return {
        key: value
        for key, value in os.environ.items()
        if key == "SLURM_CONF" or not (key.startswith(_STRIPPED) or key in _RENDEZVOUS)
    }


def call_slurm(
    *command: str,
    environment: Mapping[str, str] | None = None,
    stdin: str | None = None,
    before_exec: Callable[[], object] | None = None,
) -> tuple[int, str, str]:
    """Return exit code, output and error output of a command; the codes of a shell if it cannot."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            # What is no UTF-8, such as another job's comment, is kept, as in names of files.
            encoding="utf-8",
            errors="surrogateescape",
            timeout=_TIMEOUT_S,
            env=environment,
            input=stdin,
            preexec_fn=before_exec,
        )
    except FileNotFoundError:
        return COMMAND_NOT_FOUND, "", f"{command[0]}: not found"
    except subprocess.TimeoutExpired:
        return 124, "", f"{command[0]}: no answer in {_TIMEOUT_S} s"
    return done.returncode, done.stdout, done.stderr


def find_jobs(runs: Iterable[StageRun], run_root: Path) -> dict[str, list[QueuedJob]]:
    """Return our own jobs of these runs in the queue, by run id.

    Raises:
        SlurmError: the queue cannot be asked.
    """
    folders = {run.run_dir(run_root): run.run_id for run in runs}
    by_name = {name: folder for folder in folders for name in list_job_names(folder)}
    jobs: dict[str, list[QueuedJob]] = {}
    for job in find_jobs_named(by_name):
        folder = by_name[job.name]
        if job.belongs_to(folder):
            jobs.setdefault(folders[folder], []).append(job)
    return jobs


def find_jobs_of_folders(folders: Iterable[Path]) -> dict[Path, QueuedJob]:
    """Return the jobs in the queue of the runs in these folders.

    A job that an earlier version queued counts in whatever run root it is.

    Raises:
        SlurmError: the queue cannot be asked.
    """
    by_name = {name: folder for folder in folders for name in list_job_names(folder)}
    return {by_name[job.name]: job for job in find_jobs_named(by_name)}


def find_jobs_named(names: Collection[str]) -> list[QueuedJob]:
    """Return our own jobs with these names, and log those of other users.

    The ids of runs are the same for everybody, so anybody may queue a job of such a name.
    """
    parts: list[list[str]] = []
    length = _NAMES_LENGTH
    for name in sorted(names):
        length += len(os.fsencode(name)) + 1  # a comma
        if length > _NAMES_LENGTH:
            parts.append([])
            length = len(os.fsencode(name))
        parts[-1].append(name)
    return [job for part in parts for job in _ask_for(part)]


def _ask_for(names: Collection[str]) -> list[QueuedJob]:
    # Last come script and comment: they alone may contain the separator.
    code, out, err = call_slurm(
        "squeue", "-h", f"--name={','.join(names)}", "-o", "%i|%j|%T|%r|%E|%U|%o|%k"
    )
    if code != 0:
        raise unanswered("the queue", code, err or out)
    jobs = []
    asked = set(names)
    for line in out.splitlines():
        parts = line.strip().split("|", 6)
        if len(parts) != 7 or parts[1] not in asked:
            continue
        job_id, name, state, reason, dependency, user_id, origin = parts
        if user_id != str(os.geteuid()):
            _warn_of_foreign_job(job_id, name, user_id)
            continue
        jobs.append(QueuedJob(job_id, name, state, reason, _parent_ids(dependency), origin))
    return jobs


@cache
def _warn_of_foreign_job(job_id: str, name: str, user_id: str) -> None:
    """Log another user's job, once."""
    user = describe_owner(int(user_id)) if user_id.isdigit() else f"user {user_id}"
    logger.warning("job %s of %s is named %s like ours; it does not count", job_id, user, name)


def _parent_ids(dependency: str) -> tuple[str, ...]:
    """Return job ids: `afterok:41(unfulfilled),singleton(unfulfilled)` -> ("41",)."""
    # Only the kinds that begin with `after` have ids.
    return tuple(re.findall(r":(\d+)", dependency))


def submit_script(text: str, run_dir: Path, *, comment: bool = True) -> str:
    """Queue the batch script of a run, given on standard input, and return the id of the job.

    `comment` names the run folder in the job's comment, unless the user has another use for it.

    Raises:
        SlurmError: Slurm refuses it.
    """
    options = [f"--job-name={job_name(run_dir)}"]
    if comment:
        options.append(f"--comment={comment_of(run_dir)}")
    return submit_text(text, *options, what=str(run_dir))


def submit_text(text: str, *options: str, what: str) -> str:
    """Queue a batch script and return the id of the job; `what` names it in errors.

    Raises:
        QueueFullError: no more jobs of this user fit into the queue.
        SlurmError: Slurm refuses it.
    """
    code, out, err = call_slurm(
        "sbatch", "--parsable", *options, environment=clean_environment(), stdin=text
    )
    if code != 0 or not out.strip():
        if full := _QUEUE_FULL.search(err):
            raise QueueFullError(f"sbatch for {what}: the queue takes no more jobs ({full[0]})")
        raise SlurmError(f"sbatch for {what}: {(err or out).strip() or f'exit {code}'}")
    # The last line is `<job id>` or `<job id>;<cluster>`; a site's plugins may print others first.
    job_id = out.strip().splitlines()[-1].split(";")[0]
    if not job_id.isprintable():
        raise SlurmError(f"sbatch for {what}: its answer {job_id!r} is no job id")
    return job_id


def cancel_jobs(job_ids: Iterable[str]) -> None:
    """Cancel jobs. Jobs that have ended already are fine.

    Raises:
        SlurmError: Slurm refuses.
    """
    ids = list(job_ids)
    code, _, err = call_slurm("scancel", *ids) if ids else (0, "", "")
    refusals = [line for line in err.splitlines() if not any(words in line for words in _GONE)]
    if code != 0 and (refusals or not err.strip()):
        reason = refusals[0] if refusals else f"scancel exit {code}"
        raise SlurmError(f"cannot cancel {' '.join(ids)}: {reason}")


def cancel_pending_jobs(job_ids: Iterable[str]) -> None:
    """Cancel those of these jobs that have not started."""
    call_slurm("scancel", "--state=PENDING", *job_ids)


def warn_jobs(job_ids: Iterable[str]) -> None:
    """Send jobs the signal that Slurm sends before a time limit: they save, and end.

    A job that cannot be warned is left to whoever cancels it.
    """
    call_slurm("scancel", "--signal=USR2", *job_ids)


def parse_scontrol(line: str) -> dict[str, str]:
    """Return the fields of a line of `scontrol -o show`: `JobId=3 JobState=RUNNING ...`."""
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


def query_job_state(job_id: str) -> str | None:
    """Return the state of a job by scontrol, or by sacct once slurmctld has forgotten it.

    None if Slurm says that it does not know the job.

    Raises:
        SlurmError: Slurm gives no answer.
    """
    asked, out, err = call_slurm("scontrol", "-o", "show", "job", job_id)
    if asked == 0 and (state := parse_scontrol(out).get("JobState")):
        return state
    forgotten = _UNKNOWN_JOB in err
    code, out, _ = call_slurm("sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State")
    if code == 0 and out.split():
        return out.split()[0]  # of `CANCELLED by 1000` the first word
    if not forgotten:
        raise unanswered(f"job {job_id}", asked, err)
    return None


def read_job_note(run_dir: Path) -> dict[str, Any]:
    """Return `job_id` and `time` of the run's newest submission; {} if there is no readable one."""
    return read_json(run_dir / JOB_NOTE, _NOTE_FIELDS) or {}


def record_cancel(run_dir: Path, job_id: str) -> None:
    """Record that the user cancels a job, so that it is not started again and not called failed."""
    write_json_atomic(run_dir / CANCEL_NOTE, {"job_id": job_id, "time": time.time()})


def is_canceled(run_dir: Path, job_id: str) -> bool:
    """Return whether the user has canceled this job of a run."""
    note = read_json(run_dir / CANCEL_NOTE, _NOTE_FIELDS) or {}
    return note.get("job_id") == job_id


def call_scontrol(*arguments: str) -> tuple[int, str]:
    """Return the exit code of scontrol, and its output or error."""
    code, out, err = call_slurm("scontrol", *arguments)
    return code, out or err


def unanswered(question: str, code: int, said: str) -> SlurmError:
    """Return the error for a question that a command ended without answering."""
    # Where there is no such command, waiting does not help.
    error_type = SlurmError if code == COMMAND_NOT_FOUND else NoAnswerError
    return error_type(f"cannot ask for {question}: {last_line(said) or f'exit code {code}'}")


def last_line(text: str) -> str:
    """Return the last line of a command's output; "" if there is none."""
    return " ".join(text.strip().splitlines()[-1:])


def parse_duration_s(text: str) -> float:
    """Return `4:00`, `36:00:00` or `1-12:00:00` in seconds, infinity for `UNLIMITED`; else 0."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if found is None:
        return float("inf") if text.strip().upper() in ("UNLIMITED", "INFINITE") else 0.0
    days, hours, minutes, seconds = (int(part or "0") for part in found.groups())
    return 86400.0 * days + 3600.0 * hours + 60.0 * minutes + seconds


def query_node_address(host: str) -> str | None:
    """Return the address of a node as Slurm knows it, for names that do not resolve."""
    code, out, _ = call_slurm("scontrol", "-o", "show", "node", host)
    return parse_scontrol(out).get("NodeAddr") if code == 0 else None


def list_partitions() -> dict[str, dict[str, str]]:
    """Return what Slurm says of each partition, by its name.

    Raises:
        SlurmError: the cluster does not answer.
    """
    code, out, err = call_slurm("scontrol", "-o", "show", "partition")
    if code != 0:
        raise SlurmError((err or out).strip() or f"scontrol exit {code}")
    return {
        partition["PartitionName"]: partition
        for partition in map(parse_scontrol, out.splitlines())
        if "PartitionName" in partition
    }


def read_config() -> dict[str, str]:
    """Return the configuration of the cluster; empty if it does not tell."""
    code, out, _ = call_slurm("scontrol", "show", "config")
    pairs = (line.partition("=") for line in out.splitlines()) if code == 0 else ()
    return {key.strip(): value.strip() for key, _, value in pairs}


def query_qos_limit_s(qos: str) -> float:
    """Return the longest time limit that a QOS allows a job; infinity if it has none or is unknown.

    Without accounting there is no QOS, and nothing is lost if it does not tell: the job then waits,
    and `status` says why.
    """
    code, out, _ = call_slurm("sacctmgr", "-n", "-P", "show", "qos", qos, "format=MaxWall")
    return (parse_duration_s(out) if code == 0 else 0.0) or float("inf")


def list_associations(user: str, field: str) -> list[str]:
    """Return what a user may use: the accounts (`Account`) or qualities of service (`QOS`).

    Nothing if the cluster keeps no accounts or does not tell.
    """
    code, out, _ = call_slurm(
        "sacctmgr", "-n", "-P", "show", "associations", f"user={user}", f"format={field}"
    )
    return sorted(set(out.replace(",", " ").split())) if code == 0 else []


def dry_run_script(text: str) -> tuple[bool, str]:
    """Return whether Slurm would take a batch script, and its answer; nothing is queued."""
    code, out, err = call_slurm(
        "sbatch", "--test-only", environment=clean_environment(), stdin=text
    )
    lines = (err or out).strip().splitlines() or [f"exit code {code}"]
    return code == 0, lines[-1].removeprefix("sbatch: ").removeprefix("error: ")
