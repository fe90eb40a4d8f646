"""Attempts of a run: each start of it takes the next number, and only the newest may write results.

    <run_dir>/attempts/NNNN.json               host, pid, time and launch; created only once
    <run_dir>/attempts/NNNN.failed.json        how the attempt failed, why the job is not retried
    <run_dir>/attempts/NNNN.interrupted.json   that it was asked to stop and did
    <run_dir>/attempts/NNNN.saved.json         its newest checkpoint, and how long saving took
    <run_dir>/attempts/NNNN.energy_RRRR.json   what the GPU of a rank took, if it has a counter
    <run_dir>/attempts/NNNN.provenance.json    code, packages and machine that it ran with

A process can outlive its job in Slurm's eyes, for example on a node whose slurmd died. It then
finds a newer number here and must stop.
"""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import (
    create_json,
    list_numbered,
    read_json,
    write_json_atomic,
)

# What of an attempt's provenance tells with which code and packages numbers were made.
CODE_FACTS = ("git_sha", "git_dirty", "git_changes", "snapshot", "versions")

# Types of what is read from the records, by their kind.
_FIELDS: dict[str, dict[str, type]] = {
    "": {"host": str, "pid": int, "time": float, "launch": str, "job_id": str, "gpus": int},
    ".failed": {
        "error": str,
        "log": str,
        "time": float,
        "step": int,
        "host": str,
        "repeatable": bool,
        "verdict": str,
    },
    ".interrupted": {"reason": str, "saved": bool, "time": float},
    ".saved": {"step": int, "seconds": float, "time": float},
    ".provenance": {"versions": dict, "inputs": dict},
}


class StaleAttemptError(RuntimeError):
    """A newer attempt of the same run has started; this one must not write."""


@dataclass(frozen=True)
class Failure:
    """How an attempt failed.

    Attributes:
        error: its last error line.
        log: the log that holds the rest.
        time: when, in Unix time.
        step: the last step that was done.
        host: the host of the rank that failed.
        repeatable: the error is in code or configuration, so the next attempt would meet it again.
        no_retry_reason: why the job is not retried; empty if it is, or if that is not decided yet.
    """

    attempt: int
    error: str
    log: str
    time: float
    step: int | None = None
    host: str | None = None
    repeatable: bool = False
    no_retry_reason: str = ""


def _record_path(run_dir: Path, attempt: int, kind: str = "") -> Path:
    return Path(f"{run_dir}/attempts/{attempt:04d}{kind}.json")


def _read_record(run_dir: Path, attempt: int, kind: str = "") -> dict[str, Any] | None:
    """Return what a record says, None if there is none; values of None are left out."""
    note = read_json(_record_path(run_dir, attempt, kind), _FIELDS[kind])
    return note and {key: value for key, value in note.items() if value is not None}


def list_attempts(run_dir: Path) -> list[int]:
    """Return the numbers of the attempts so far, ascending.

    Only files that belong to the owner of the folder count: anybody else's would end our attempts.
    """
    # As text: most of thousands of runs have no such folder.
    return list_numbered(f"{run_dir}/attempts")


def latest_attempt(run_dir: Path) -> int:
    """Return the number of the newest attempt, 0 if there is none."""
    return max(list_attempts(run_dir), default=0)


def start_attempt(run_dir: Path, *, launch: str = "", **facts: Any) -> int:
    """Take the next attempt number and record who took it.

    `launch` is equal on all ranks of one start and differs between starts; the other ranks find the
    number by it, see `find_attempt`. `facts` are further content of the record, such as the job id.
    """
    process = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    number = latest_attempt(run_dir)
    while True:
        number += 1
        with suppress(FileExistsError):  # another process has taken it meanwhile
            create_json(_record_path(run_dir, number), {**process, "launch": launch, **facts})
            return number


def find_attempt(run_dir: Path, launch: str, *, timeout_s: float = 300.0) -> int:
    """Return the attempt number that rank 0 of a launch took.

    Waits until rank 0 has taken one, at most `timeout_s` seconds.

    Raises:
        TimeoutError: rank 0 has not started an attempt in time.
    """
    end = time.monotonic() + timeout_s
    while True:
        for number in reversed(list_attempts(run_dir)):
            if read_attempt(run_dir, number).get("launch") == launch:
                return number
        if time.monotonic() > end:
            raise TimeoutError(
                f"{run_dir / 'attempts'}: rank 0 of {launch!r} took no number in {timeout_s:.0f} s"
            )
        time.sleep(0.05)


def read_attempt(run_dir: Path, attempt: int) -> dict[str, Any]:
    """Return what was recorded when an attempt started; an empty dict if there is none."""
    return _read_record(run_dir, attempt) or {}


def find_start_time(run_dir: Path, attempt: int) -> float:
    """Return when an attempt began by the clock of the file server; 0.0 if there is no record."""
    try:
        return _record_path(run_dir, attempt).lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def is_newest_attempt(run_dir: Path, attempt: int) -> bool:
    """Return whether no newer attempt has started. Only then may this one write or publish."""
    return latest_attempt(run_dir) <= attempt


def check_newest(run_dir: Path, attempt: int) -> None:
    """Raise StaleAttemptError if a newer attempt of the run has started."""
    if not is_newest_attempt(run_dir, attempt):
        raise StaleAttemptError(
            f"{run_dir}: attempt {attempt} is not the newest, it may not publish"
        )


def record_failure(
    run_dir: Path,
    attempt: int,
    *,
    error: str,
    log: Path,
    step: int | None = None,
    host: str | None = None,
    repeatable: bool = False,
) -> None:
    """Record that an attempt failed.

    The first rank to say so is kept: the errors of later ones, such as closed connections, mostly
    follow from it.
    """
    path = _record_path(run_dir, attempt, ".failed")
    # One that cannot be read says nothing; somebody else may have put it there.
    if _read_record(run_dir, attempt, ".failed") is None:
        content = {"error": error, "log": str(log), "time": time.time()}
        write_json_atomic(path, {**content, "step": step, "host": host, "repeatable": repeatable})


def read_failure(run_dir: Path, attempt: int | None = None) -> Failure | None:
    """Return how an attempt (the newest by default) failed, or None if it recorded no failure."""
    number = latest_attempt(run_dir) if attempt is None else attempt
    note = _read_record(run_dir, number, ".failed")
    if note is None:
        return None
    return Failure(
        attempt=number,
        error=note.get("error", ""),
        log=note.get("log", ""),
        time=float(note.get("time", 0.0)),
        step=note.get("step"),
        host=note.get("host"),
        repeatable=note.get("repeatable", False),
        no_retry_reason=note.get("verdict", ""),
    )


def list_failures(run_dir: Path) -> list[Failure]:
    """Return the failures of all attempts, oldest first."""
    found = (read_failure(run_dir, number) for number in list_attempts(run_dir))
    return [failure for failure in found if failure is not None]


def record_no_retry(run_dir: Path, attempt: int, reason: str) -> None:
    """Add to a failure why the job is not retried."""
    path = _record_path(run_dir, attempt, ".failed")
    note = _read_record(run_dir, attempt, ".failed") or {}
    write_json_atomic(path, {**note, "verdict": reason})


def record_interruption(run_dir: Path, attempt: int, reason: str, *, saved: bool = False) -> None:
    """Record that an attempt was asked to stop and did, and whether it `saved` before that."""
    path = _record_path(run_dir, attempt, ".interrupted")
    write_json_atomic(path, {"reason": reason, "saved": saved, "time": time.time()})


def read_interruption(run_dir: Path, attempt: int) -> str | None:
    """Return why an attempt stopped when asked to, or None if it did not."""
    note = _read_record(run_dir, attempt, ".interrupted")
    return None if note is None else str(note.get("reason", ""))


def record_save(run_dir: Path, attempt: int, *, step: int, seconds: float) -> None:
    """Record the newest checkpoint of an attempt, and the longest time that saving one took."""
    path = _record_path(run_dir, attempt, ".saved")
    before = _read_record(run_dir, attempt, ".saved") or {}
    longest = max(seconds, float(before.get("seconds", 0.0)))
    write_json_atomic(path, {"step": step, "seconds": longest, "time": time.time()})


def has_saved(run_dir: Path, attempt: int) -> bool:
    """Return whether an attempt saved something that the next one goes on from."""
    stopped = _read_record(run_dir, attempt, ".interrupted") or {}
    return bool(stopped.get("saved")) or _record_path(run_dir, attempt, ".saved").exists()


def record_provenance(run_dir: Path, attempt: int, facts: Mapping[str, Any]) -> None:
    """Record the code, packages and machine of an attempt."""
    write_json_atomic(_record_path(run_dir, attempt, ".provenance"), dict(facts))


def record_energy(run_dir: Path, attempt: int, rank: int, gpu: str, joules: float) -> None:
    """Record what a rank's GPU took during an attempt."""
    path = _record_path(run_dir, attempt, f".energy_{rank:04d}")
    write_json_atomic(path, {"gpu": gpu, "joules": round(joules, 3)})


def count_energy(run_dir: Path, attempt: int) -> int:
    """Return how many ranks have recorded the energy of an attempt."""
    return len(list((run_dir / "attempts").glob(f"{attempt:04d}.energy_*.json")))


def list_energy(run_dir: Path, attempt: int) -> dict[str, float]:
    """Return the joules that ranks recorded for an attempt, by GPU."""
    found: dict[str, float] = {}
    for path in (run_dir / "attempts").glob(f"{attempt:04d}.energy_*.json"):
        note = read_json(path) or {}
        joules = note.get("joules")
        if isinstance(joules, int | float) and joules >= 0:
            # Ranks that share a GPU have its counter in common.
            gpu = str(note.get("gpu"))
            found[gpu] = max(found.get(gpu, 0.0), float(joules))
    return found


def list_code_versions(run_dir: Path, *, before: int | None = None) -> list[dict[str, Any]]:
    """Return what the attempts so far, or those `before` a number, ran with; the oldest first.

    Each has `attempt` and the provenance that describes code and packages. An attempt with the code
    and packages of the one before it is left out.
    """
    found: list[dict[str, Any]] = []
    for number in list_attempts(run_dir):
        note = _read_record(run_dir, number, ".provenance")
        if note is None or (before is not None and number >= before):
            continue
        code = {key: note.get(key) for key in CODE_FACTS}
        if not found or code != {key: found[-1][key] for key in CODE_FACTS}:
            found.append({"attempt": number, **code})
    return found


def read_inputs(run_dir: Path, attempt: int) -> dict[str, Any]:
    """Return the inputs that an attempt recorded when it began; {} if it recorded none."""
    return dict((_read_record(run_dir, attempt, ".provenance") or {}).get("inputs", {}))


def list_saves(run_dir: Path) -> list[dict[str, Any]]:
    """Return `step`, `seconds` and `time` of each attempt that saved, oldest first."""
    notes = (_read_record(run_dir, number, ".saved") for number in list_attempts(run_dir))
    return [note for note in notes if note is not None]


def is_running_here(run_dir: Path) -> bool:
    """Return whether rank 0 of the newest attempt is alive on this machine."""
    note = read_attempt(run_dir, latest_attempt(run_dir))
    if note.get("host") != socket.gethostname() or "pid" not in note:
        return False
    try:
        command = Path(f"/proc/{note['pid']}/cmdline").read_bytes()
    except OSError:
        return False
    # The kernel gives the numbers of dead processes to new ones, so the number alone proves
    # nothing.
    return b"slurm.node.job" in command
