"""The lock of a run: only its holder looks into the queue for the run and calls sbatch.

    <run_dir>/claims/NNNN.json            host, user, pid and start of the holder; created once
    <run_dir>/claims/NNNN.released.json   it is released: the job id, if there is one

The next number may be taken when the last lock is released or stale. A lock of this user on this
host is stale when its process is gone, and so is the sbatch that it called; any other lock, and one
that cannot be read, is stale after ten minutes. Ages are measured by the clock of the file server,
so that no host whose clock is wrong locks a run for ever. Files of other users do not count. The
new holder looks into the queue first, so a job that was queued by a submission that died is found,
not queued again.

Claim files are never deleted; otherwise a process that sees a release late could take a number that
was already used.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import (
    create_json,
    list_numbered,
    read_json,
    read_server_time,
    write_json_atomic,
)
from slurm.shared.queue import SlurmError, list_job_names, read_job_note

# Longer than submitting one run can take, with the time-outs of its Slurm commands.
_FOREIGN_STALE_S = 600.0
_SETTLE_S = 3.0  # slurmctld may have received the request of an sbatch that was killed just now
_EXEC_S = 0.5  # between fork and exec, a process that becomes sbatch does not look like one yet
_PATIENCE_S = 900.0  # longer than _FOREIGN_STALE_S, so that a dead holder is outlived


@dataclass(frozen=True)
class SubmissionLock:
    """The right to queue a run, until it is released or taken over."""

    run_dir: Path
    number: int

    def is_current(self) -> bool:
        """Return whether nobody has taken the lock over, as happens to a process that slept."""
        return _latest(self.run_dir) == self.number

    def release(self, job_id: str | None) -> None:
        """Let the next process take the lock."""
        write_json_atomic(_claim_path(self.run_dir, self.number, ".released"), {"job_id": job_id})


@contextmanager
def submission_lock(
    run_dir: Path, patience_s: float = _PATIENCE_S, *, break_lock: bool = False
) -> Iterator[SubmissionLock]:
    """Hold the lock of a run; wait for others to release it, or with `break_lock` take it over.

    Raises:
        SlurmError: another process keeps it for longer than `patience_s`.
    """
    lock = _take(run_dir, patience_s, break_lock=break_lock)
    try:
        yield lock
    finally:
        lock.release(read_job_note(run_dir).get("job_id"))


def _take(run_dir: Path, patience_s: float, *, break_lock: bool = False) -> SubmissionLock:
    end = time.monotonic() + patience_s
    pause = 0.05
    _claim_path(run_dir, 0).parent.mkdir(parents=True, exist_ok=True)
    while True:
        last = _latest(run_dir)
        if last == 0 or break_lock or _released(run_dir, last) or _stale(run_dir, last):
            with suppress(FileExistsError):  # another process was faster
                holder = {
                    **_here(),
                    "pid": os.getpid(),
                    "began": _process_start(os.getpid()),
                    "time": time.time(),
                }
                create_json(_claim_path(run_dir, last + 1), holder)
                return SubmissionLock(run_dir, last + 1)
        if time.monotonic() > end:
            other = read_json(_claim_path(run_dir, last)) or {}
            raise SlurmError(
                f"{run_dir.name} is being submitted by process {other.get('pid')} "
                f"on {other.get('host')}; try again when that has ended, or with --break-lock if "
                "you know that it has"
            )
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)


def _claim_path(run_dir: Path, number: int, kind: str = "") -> Path:
    return run_dir / "claims" / f"{number:04d}{kind}.json"


def _latest(run_dir: Path) -> int:
    return max(list_numbered(run_dir / "claims"), default=0)


def _released(run_dir: Path, number: int) -> bool:
    return _claim_path(run_dir, number, ".released").exists()


def _here() -> dict[str, object]:
    """Return whose processes can be seen from here: a host may hide those of other users."""
    return {"host": socket.gethostname(), "user": os.getuid()}


def _stale(run_dir: Path, number: int) -> bool:
    path = _claim_path(run_dir, number)
    try:
        written = path.lstat().st_mtime
    except FileNotFoundError:
        return False  # not seen at this moment: look again
    # Both ways: one from the future was written while the server's clock was wrong.
    age_s = abs(read_server_time(path.parent) - written)
    holder = read_json(path) or {}
    pid = holder.get("pid")
    if not isinstance(pid, int) or any(holder.get(key) != now for key, now in _here().items()):
        return age_s > _FOREIGN_STALE_S
    if _process_start(pid) == holder.get("began") or age_s < _SETTLE_S or _sbatch_runs(run_dir):
        return False
    time.sleep(_EXEC_S)
    return not _sbatch_runs(run_dir)


def _process_start(pid: int) -> str | None:
    """Return when a process of this host started, in clock ticks since boot; None if it has ended.

    Process ids are reused, so only id and start together name a process.
    """
    try:
        # proc(5): the name in parentheses may contain spaces; after it come the state and, as the
        # twentieth value, the start time.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _sbatch_runs(run_dir: Path) -> bool:
    """Return whether an sbatch of this run, left by a killed submission, still runs here."""
    options = {f"--job-name={name}".encode() for name in list_job_names(run_dir)}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if options.intersection((process / "cmdline").read_bytes().split(b"\0")):
                return True
        except OSError:
            continue  # it has ended meanwhile, or is another user's
    return False
