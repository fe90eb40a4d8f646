"""The keeper: submits again what a person would, until a reproduction is finished or stuck.

    <run_root>/keepers/<user id>/<name>.json            what it keeps: runs, cluster profile
    <run_root>/keepers/<user id>/<name>.progress.json   how far these were, and when
    <run_root>/keepers/<user id>/<name>.end.json        why the last keeper ended

Slurm requeues most jobs by itself. But where PreemptMode is CANCEL, a preempted job ends for good,
and its dependents leave the queue. `submit` therefore queues one more small job, which starts
whenever a job of the reproduction ends: it submits what is missing, and queues the next keeper. It
ends with a reason when all is done, when what is left needs a person, or when ten keepers one after
the other saw no progress. It starts no run that failed for good or that the user canceled.

`python -m slurm.keeper NOTE SHA256` is the job. Exit codes: 0 it has done its work, 2 the note is
not what the job was submitted with, 70 an error that nobody has foreseen, 75 Slurm did not answer
in time and the batch script starts this job again.
"""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import attempts, manifest, runfile
from pipeline.files import (
    CHECKSUM_KEY,
    ChecksumError,
    read_json,
    verify_checksum,
    with_checksum,
    write_atomic,
    write_json_atomic,
)
from pipeline.ownership import keep_others_from_writing
from pipeline.spec import ConfigError, Resources, StageRun
from slurm.budget import describe_overrun
from slurm.shared import queue
from slurm.shared.exit_codes import EXIT_INTERNAL, EXIT_INTERRUPTED
from slurm.shared.keeper_notes import END, PROGRESS, find_keeper_folder
from slurm.status import RunStatus, collect_status
from slurm.submission.profile import KEEPER, ClusterProfile, keeper_command, profile_of_stage
from slurm.submission.snapshot import checking_lines, make_own_folder, take_snapshot
from slurm.submission.submit import render_script, submit

logger = logging.getLogger("slurm.keeper")  # `__name__` is "__main__" under `python -m`
_NAME = f"{queue.JOB_PREFIX}keep-"
_PATIENCE = 10  # keepers one after the other without any progress
_PAUSE_S = 300  # before the next keeper, after one that saw no progress
_SAME_LOOK_S = 30.0  # so soon after a look that counts, another one counts for nothing
_NEED = Resources(gpu=False, ranks_per_node=1, cpus_per_rank=1, hours=0.5, memory_gb=2)
_LEAD_S = 60
_ANSWER_S = 1200.0  # a restart of the controller takes minutes
_ASK_AGAIN_S = 30.0
# A keeper that was killed, or got no answer, starts again. So does one that never began: without a
# controller, srun ends with 1, and for a while nobody takes the job back either. A job that is
# being canceled stays ended.
_TEARDOWN = (
    "code=$?",
    f'if [ "${{SLURM_RESTART_COUNT:-0}}" -lt 100 ] &&'
    f" {{ [ $code -eq 1 ] || [ $code -eq {EXIT_INTERRUPTED} ] || [ $code -gt 128 ]; }}; then",
    "  asked=1",
    '  until job=$(scontrol -o show job "$SLURM_JOB_ID") || [ $asked -ge 20 ]; do',
    "    sleep 30",
    "    asked=$((asked + 1))",
    "  done",
    '  case "$job" in *JobState=RUNNING*) scontrol requeue "$SLURM_JOB_ID" ;; esac',
    "fi",
    "exit $code",
)


@dataclass(frozen=True)
class Round:
    """What one look at the runs led to. `state` is working | finished | stuck | unknown.

    `job_ids` are the jobs in the queue; there may be none of a state `working` if it is full.
    """

    state: str
    submitted: Sequence[str] = ()
    reasons: Sequence[str] = ()
    job_ids: Sequence[str] = ()


def queue_keeper(
    runs: Sequence[StageRun], profile: ClusterProfile, budget: float | None = None
) -> str | None:
    """Queue the keeper of these runs, and return the id of its job; None if no run has a job.

    One that waits in the queue already is replaced. Once `budget` GPU-hours are spent, it submits
    nothing more.

    Raises:
        QueueFullError: there is no place for it in the queue.
        SlurmError: Slurm does not answer, or refuses.
    """
    jobs = queue.find_jobs(runs, profile.run_root)
    job_ids = [job.job_id for run in runs for job in jobs.get(run.run_id, ()) if job.can_run]
    if not job_ids:
        return None
    note, sha256 = _write_note(runs, profile, budget)
    for ending in (PROGRESS, END):  # of an earlier submission
        note.with_suffix(ending).unlink(missing_ok=True)
    _count_idle_looks(note, runs, profile.run_root)  # begins to count
    return _queue(note, sha256, job_ids, profile)


def try_queue_keeper(
    runs: Sequence[StageRun], profile: ClusterProfile, budget: float | None = None
) -> tuple[str | None, list[str]]:
    """Queue the keeper of these runs; return the id of its job, and a note if it has no place.

    Raises:
        SlurmError: Slurm does not answer, or refuses.
    """
    try:
        return queue_keeper(runs, profile, budget), []
    except queue.QueueFullError as error:
        return None, [f"note: no keeper: {error}; submit --keep goes on from your terminal"]


def keep_going(note: Path, sha256: str) -> Round:
    """Do the work of a keeper's job: look once, submit what is missing, queue the next keeper.

    Raises:
        ConfigError: the note, or the file of a run, is not what the job was submitted with.
        SlurmError: Slurm refuses.
    """
    runs, profile, budget = _read_note(note, sha256)
    has_successor = True
    if own_id := os.environ.get("SLURM_JOB_ID"):
        try:
            # If this one is killed, that one goes on at once.
            _queue(note, sha256, [own_id], profile)
        except queue.QueueFullError as error:
            has_successor = False
            logger.warning("%s", error)
    found = look_after(runs, profile, budget, leave_room=not has_successor)
    idle = _count_idle_looks(note, runs, profile.run_root)
    # While jobs of other reproductions fill the queue, no progress is expected.
    if found.state == "working" and idle >= _PATIENCE and found.job_ids:
        reason = (
            f"{idle} keepers one after the other saw no progress; submit again to try once more"
        )
        found = Round("stuck", found.submitted, [reason])
    if found.state in ("finished", "stuck"):
        end = {"state": found.state, "reasons": list(found.reasons), "time": time.time()}
        write_json_atomic(note.with_suffix(END), end)
        queue.cancel_jobs(job.job_id for job in _find_waiting(note))
    elif found.state == "working":
        _queue(note, sha256, found.job_ids, profile, pause=idle > 0 or not found.job_ids)
    return found


def watch(
    runs: Sequence[StageRun],
    profile: ClusterProfile,
    budget: float | None = None,
    *,
    on_round: Callable[[Round], object],
    pause_s: float = 60.0,
) -> Round:
    """Keep the runs going from this process, until they are finished or stuck."""
    while True:
        found = look_after(runs, profile, budget)
        on_round(found)
        if found.state in ("finished", "stuck"):
            return found
        time.sleep(pause_s)


def look_after(
    runs: Sequence[StageRun],
    profile: ClusterProfile,
    budget: float | None = None,
    *,
    leave_room: bool = False,
) -> Round:
    """Submit the runs that are neither done, nor in the queue, nor in need of a person.

    If Slurm does not answer, the state is `unknown` and nothing is submitted. If it takes only some
    of them, the others are left for the next look; `leave_room` leaves a place for a keeper.
    """
    try:
        statuses = collect_status(runs, profile.run_root)
        if any(status.state == "unknown" for status in statuses):
            return Round("unknown", reasons=["Slurm does not answer"])
        if overrun := describe_overrun(statuses, budget):
            return Round("stuck", reasons=[overrun])
        stuck = _find_stuck(statuses)
        wanted = [status.run for status in statuses if status.run.run_id not in stuck]
        made = submit(wanted, profile, leave_room=leave_room)
    except queue.SlurmError as error:
        return Round("unknown", reasons=[str(error)])
    submitted = [each.run.name for each in made if each.action == "submitted"]
    job_ids = [each.job_id for each in made if each.job_id]
    deferred = [each for each in made if each.action == "deferred"]
    if job_ids or deferred:
        reasons = [f"{len(deferred)} runs wait: {deferred[0].reason}"] if deferred else []
        return Round("working", submitted, reasons, job_ids)
    # By what `submit` found: a run may have ended well since the statuses were collected.
    if not stuck and all(each.action == "done" for each in made):
        return Round("finished")
    # Runs of a colleague are skipped, and those that need them.
    skipped = [f"{each.run.name}: {each.reason}" for each in made if each.action == "skipped"]
    return Round("stuck", reasons=[*stuck.values(), *skipped])


def _find_stuck(statuses: Sequence[RunStatus]) -> dict[str, str]:
    """Return why runs need a person, by id: they failed, or need one that did."""
    stuck: dict[str, str] = {}
    for status in statuses:  # in topological order
        run = status.run
        if status.state in ("failed", "blocked", "canceled"):
            stuck[run.run_id] = f"{run.name} {status.state}: {status.detail}"
        elif status.state != "done" and stuck.keys() & set(run.needs.values()):
            stuck[run.run_id] = f"{run.name} needs a run that is not done"
    return stuck


def _count_idle_looks(note: Path, runs: Sequence[StageRun], run_root: Path) -> int:
    """Return how many looks in a row, this one included, saw no run end or save something new.

    Two keepers that look at the same moment count once: what one saw is no news for the other.
    """
    saves = [list(attempts.list_saves(run.run_dir(run_root)))[-1:] for run in runs]
    # Whether files of a finished run are damaged is asked where it is submitted again.
    recorded = set(manifest.list_run_ids(run_root))
    now = [
        [run.run_id in recorded for run in runs],
        [save.get("step") for newest in saves for save in newest],
    ]
    path = note.with_suffix(PROGRESS)
    before = read_json(path) or {}
    idle = int(before.get("idle", 0))
    counted_at = float(before.get("time", 0.0))
    if before.get("progress") != now:
        idle = 0
        counted_at = time.time()
    elif abs(time.time() - counted_at) > _SAME_LOOK_S:
        idle += 1
        counted_at = time.time()
    write_json_atomic(path, {"progress": now, "idle": idle, "time": counted_at})
    return idle


def _write_note(
    runs: Sequence[StageRun], profile: ClusterProfile, budget: float | None
) -> tuple[Path, str]:
    """Write down what a keeper keeps; return the path of the note and its checksum.

    Only this user may read it, as it holds the profile.
    """
    root = profile.run_root
    folders = {
        str(run.run_dir(root).relative_to(root)): runfile.describe_run(run)[CHECKSUM_KEY]
        for run in runs
    }
    name = hashlib.sha256("\n".join([str(root), *folders]).encode()).hexdigest()[:12]
    folder = find_keeper_folder(root)
    make_own_folder(root, folder)
    content = {
        "run_root": str(root),
        "budget": budget,
        "runs": folders,
        # What --set gave counts more than the profile; the file of a run does not tell.
        "from_command_line": {
            folder: sorted(run.resources.names_from_command_line)
            for folder, run in zip(folders, runs, strict=True)
        },
        "profile": profile.model_dump(mode="json", exclude_unset=True, exclude={"run_root"}),
    }
    path = folder / f"{_NAME}{name}.json"
    record = with_checksum(content)
    write_atomic(path, json.dumps(record, indent=1) + "\n", private=True)
    return path, record[CHECKSUM_KEY]


def _read_note(path: Path, sha256: str) -> tuple[list[StageRun], ClusterProfile, float | None]:
    content: dict[str, Any] = read_json(path) or {}
    try:
        checked = verify_checksum(content)
    except ChecksumError as error:
        raise ConfigError(f"{path}: {error}; submit again") from None
    if content[CHECKSUM_KEY] != sha256:
        raise ConfigError(f"{path}: a newer submission has a keeper of its own")
    root = Path(checked["run_root"])
    profile = ClusterProfile.model_validate({**checked["profile"], "run_root": root})
    runs = []
    for folder, checksum in checked["runs"].items():
        run = runfile.read_run_file(root / folder, checksum).build()
        names = checked["from_command_line"][folder]
        runs.append(replace(run, resources=run.resources.mark_from_command_line(names)))
    return runs, profile, checked["budget"]


def _find_waiting(note: Path) -> list[queue.QueuedJob]:
    return [job for job in queue.find_jobs_named([note.stem]) if job.state == "PENDING"]


def _queue(
    note: Path,
    sha256: str,
    job_ids: Sequence[str],
    profile: ClusterProfile,
    *,
    pause: bool = False,
) -> str:
    """Queue a keeper that starts when one of these jobs ends; cancel the one that waits by now.

    `sha256` is that of the note as it was written or checked. It is not read again: in a shared run
    root, another user may have put a note of theirs in its place, which says what runs as us.
    Without jobs, it starts when this keeper has ended.
    """
    waiting = _find_waiting(note)
    own = profile_of_stage(profile, KEEPER, gpu=False)
    code = take_snapshot(profile.run_root)
    text = render_script(
        own,
        _NEED,
        folder=note.parent,
        name=note.stem,
        dependency="?".join(f"afterany:{job_id}" for job_id in job_ids) or "singleton",
        command=keeper_command(own, note, sha256),
        code=code,
        checks=checking_lines(code),
        lead_s=_LEAD_S,
        teardown=_TEARDOWN,
    )
    begin = [f"--begin=now+{_PAUSE_S}"] if pause else []
    what = f"the keeper {note.stem}"
    try:
        job_id = queue.submit_text(text, *begin, what=what)
    except queue.QueueFullError:
        if not waiting:
            raise
        queue.cancel_jobs(job.job_id for job in waiting)  # its place is the only one
        return queue.submit_text(text, *begin, what=what)
    queue.cancel_jobs(job.job_id for job in waiting)  # after that: at every moment there is one
    return job_id


def main(arguments: list[str]) -> int:
    """Run the command line, `NOTE SHA256`, and return the exit code of the job."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    keep_others_from_writing()
    end = time.monotonic() + _ANSWER_S
    while True:
        try:
            found = keep_going(Path(arguments[0]), arguments[1])
        except ConfigError as error:
            logger.error("%s", error)
            return 2
        except queue.SlurmError as error:
            problem = str(error)
        else:
            logger.info("%s; submitted: %s", found.state, ", ".join(found.submitted) or "nothing")
            for reason in found.reasons:
                logger.info("%s", reason)
            if found.state != "unknown":
                return 0
            problem = "; ".join(found.reasons)
        logger.warning("%s", problem)
        if time.monotonic() > end:
            return EXIT_INTERRUPTED
        time.sleep(_ASK_AGAIN_S)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Exception:
        # Not 1, which is srun's own code: it would be tried again and again.
        logger.exception("internal error")
        sys.exit(EXIT_INTERNAL)
