"""Claims: of all who submit at the same time, one at a time looks, decides and calls sbatch for a run.

    <run_dir>/claims/NNNN.json            who: host, user, pid, when it started, time; made at once, and only once
    <run_dir>/claims/NNNN.released.json   over: the job id, if there is one
The next number may be taken when the last one is released, or stale: its process is gone from this host and so is the
sbatch it called, or it is of another host or user and older than ten minutes. Who takes over looks into the queue
first, so a job that was queued by a submission that died is found, not queued again. No number is removed: who learned
late that one is released would otherwise be given the next one a second time.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import create_json, read_json, write_json_atomic
from slurm.shared.queue import JOB_NOTE, SCRIPT, SlurmError

_FOREIGN_STALE_S = (
    600.0  # longer than a submission of one run can take with its Slurm commands' time-outs
)
_SETTLE_S = 3.0  # a killed sbatch may have been heard just before
_EXEC_S = 0.5  # a process that is about to become sbatch does not look like it yet
_PATIENCE_S = 900.0


@dataclass(frozen=True)
class SubmissionLock:
    """The right to queue a run, until it is released or taken over."""

    run_dir: Path
    number: int

    def is_current(self) -> bool:
        """Whether nobody has taken over, as happens to who sleeps for long."""
        return _latest(self.run_dir) == self.number

    def release(self, job_id: str | None) -> None:
        """Let the next one look."""
        write_json_atomic(
            _folder(self.run_dir) / f"{self.number:04d}.released.json", {"job_id": job_id}
        )


@contextmanager
def submission_lock(run_dir: Path, patience_s: float = _PATIENCE_S) -> Iterator[SubmissionLock]:
    """Hold the claim of a run; waits for others. SlurmError when one keeps it for too long."""
    claim = _take(run_dir, patience_s)
    try:
        yield claim
    finally:
        claim.release((read_json(run_dir / JOB_NOTE) or {}).get("job_id"))


def _take(run_dir: Path, patience_s: float) -> SubmissionLock:
    folder, end, pause = _folder(run_dir), time.monotonic() + patience_s, 0.05
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        last = _latest(run_dir)
        if last == 0 or _released(run_dir, last) or _stale(run_dir, last):
            with suppress(FileExistsError):  # somebody else was faster
                create_json(folder / f"{last + 1:04d}.json", _signature())
                return SubmissionLock(run_dir, last + 1)
        if time.monotonic() > end:
            who = read_json(folder / f"{last:04d}.json") or {}
            raise SlurmError(
                f"{run_dir.name} is being submitted by process {who.get('pid')} on {who.get('host')}"
            )
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)


def _folder(run_dir: Path) -> Path:
    return run_dir / "claims"


def _latest(run_dir: Path) -> int:
    return max(
        (int(path.name.partition(".")[0]) for path in _folder(run_dir).glob("[0-9]*.json")),
        default=0,
    )


def _released(run_dir: Path, number: int) -> bool:
    return (_folder(run_dir) / f"{number:04d}.released.json").exists()


def _signature() -> dict[str, object]:
    pid = os.getpid()
    return {**_place(), "pid": pid, "began": _began(pid), "time": time.time()}


def _place() -> dict[str, object]:
    """Whose processes can be seen: a host may hide those of other users."""
    return {"host": socket.gethostname(), "user": os.getuid()}


def _stale(run_dir: Path, number: int) -> bool:
    who = read_json(_folder(run_dir) / f"{number:04d}.json")
    if who is None:
        return False  # removed meanwhile, or not readable: look again
    age = time.time() - float(who["time"])
    if any(who.get(name) != here for name, here in _place().items()):
        return age > _FOREIGN_STALE_S
    alive = _began(int(who["pid"])) == who["began"]
    if alive or age < _SETTLE_S or _sbatch_runs(run_dir):
        return False
    time.sleep(_EXEC_S)
    return not _sbatch_runs(run_dir)


def _began(pid: int) -> str | None:
    """When a process of this host started, in the kernel's ticks; None when there is none (a zombie is none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _sbatch_runs(run_dir: Path) -> bool:
    """Whether an sbatch of this run, left behind by a submission that was killed, still runs on this host."""
    script = str(run_dir / SCRIPT).encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if script in (process / "cmdline").read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False
