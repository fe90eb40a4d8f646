"""Attempts of a run: each takes the next number, and only the newest may publish.

`<run_dir>/attempts/NNNN.json` is created once, so two processes can never hold one number.
`NNNN.failed.json` beside it says how an attempt ended when it failed, `NNNN.interrupted.json` that it was asked to stop
and did, `NNNN.saved.json` what its newest checkpoint is and what saving cost.
A process that was thought dead and is not (a node that lost its daemon) finds a newer number and must stop.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import create_json, read_json, write_json_atomic


class StaleAttemptError(RuntimeError):
    """A newer attempt of the same run has started; this one must not write."""


@dataclass(frozen=True)
class Failure:
    """How an attempt failed: its last error line, the log that holds the rest, when (Unix time), the step, the host.

    `repeatable`: an error in code or configuration, which the next attempt would meet again. `verdict`: why there is
    no next attempt.
    """

    attempt: int
    error: str
    log: str
    time: float
    step: int | None = None
    host: str | None = None
    repeatable: bool = False
    no_retry_reason: str = ""


def _folder(run_dir: Path) -> Path:
    return run_dir / "attempts"


def list_attempts(run_dir: Path) -> list[int]:
    """Numbers of the attempts so far, ascending."""
    names = (p.name.removesuffix(".json") for p in _folder(run_dir).glob("[0-9]*.json"))
    return sorted(int(name) for name in names if name.isdigit())


def latest_attempt(run_dir: Path) -> int:
    """Number of the newest attempt, 0 when there is none."""
    return max(list_attempts(run_dir), default=0)


def start_attempt(run_dir: Path, *, launch: str = "", **facts: Any) -> int:
    """Take the next attempt number; host, pid and time are noted with `facts` (job id).

    `launch` is equal on all ranks of one start and differs between starts; ranks `find` their number by it.
    """
    note = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "launch": launch,
        **facts,
    }
    number = latest_attempt(run_dir) + 1
    while True:
        try:
            create_json(_folder(run_dir) / f"{number:04d}.json", note)
        except FileExistsError:
            number += 1
            continue
        return number


def find_attempt(run_dir: Path, launch: str, *, timeout_s: float = 300.0) -> int:
    """Number of the attempt that a launch took; waits for rank 0 to take it, at most `timeout_s`."""
    end = time.monotonic() + timeout_s
    while True:
        for number in reversed(list_attempts(run_dir)):
            if read_attempt(run_dir, number).get("launch") == launch:
                return number
        if time.monotonic() > end:
            raise TimeoutError(
                f"{_folder(run_dir)}: rank 0 took no attempt for {launch!r} in {timeout_s:.0f} s"
            )
        time.sleep(0.05)


def read_attempt(run_dir: Path, attempt: int) -> dict[str, Any]:
    """What was noted when an attempt started; nothing when there is no such attempt."""
    return read_json(_folder(run_dir) / f"{attempt:04d}.json") or {}


def is_newest_attempt(run_dir: Path, attempt: int) -> bool:
    """Whether no newer attempt has started: only then may this one write checkpoints or publish."""
    return latest_attempt(run_dir) <= attempt


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
    """Note that an attempt failed; the first rank to say so wins, later ones are mostly its consequences."""
    path = _folder(run_dir) / f"{attempt:04d}.failed.json"
    if not path.exists():
        facts = {"step": step, "host": host, "repeatable": repeatable}
        write_json_atomic(path, {"error": error, "log": str(log), "time": time.time(), **facts})


def read_failure(run_dir: Path, attempt: int | None = None) -> Failure | None:
    """How an attempt (the newest by default) failed, or None when it did not say so."""
    number = latest_attempt(run_dir) if attempt is None else attempt
    note = read_json(_folder(run_dir) / f"{number:04d}.failed.json")
    if note is None:
        return None
    when = float(note.get("time", 0.0))
    facts = (
        note.get("step"),
        note.get("host"),
        bool(note.get("repeatable", False)),
        str(note.get("verdict", "")),
    )
    return Failure(number, str(note.get("error", "")), str(note.get("log", "")), when, *facts)


def record_no_retry(run_dir: Path, attempt: int, reason: str) -> None:
    """Add to a failure why no other attempt follows."""
    path = _folder(run_dir) / f"{attempt:04d}.failed.json"
    write_json_atomic(path, {**(read_json(path) or {}), "verdict": reason})


def record_interruption(run_dir: Path, attempt: int, reason: str) -> None:
    """Note that an attempt was asked to stop and did."""
    path = _folder(run_dir) / f"{attempt:04d}.interrupted.json"
    write_json_atomic(path, {"reason": reason, "time": time.time()})


def read_interruption(run_dir: Path, attempt: int) -> str | None:
    """Why an attempt stopped when asked to, or None when it did not."""
    note = read_json(_folder(run_dir) / f"{attempt:04d}.interrupted.json")
    return None if note is None else str(note.get("reason", ""))


def record_save(run_dir: Path, attempt: int, *, step: int, seconds: float) -> None:
    """Note the newest checkpoint of an attempt and the longest time that saving one took."""
    path = _folder(run_dir) / f"{attempt:04d}.saved.json"
    longest = max(seconds, float((read_json(path) or {}).get("seconds", 0.0)))
    write_json_atomic(path, {"step": step, "seconds": longest, "time": time.time()})


def list_saves(run_dir: Path) -> list[dict[str, Any]]:
    """`step`, `seconds` and `time` of each attempt that saved, oldest first."""
    notes = (
        read_json(_folder(run_dir) / f"{number:04d}.saved.json")
        for number in list_attempts(run_dir)
    )
    return [note for note in notes if note is not None]


def is_running_here(run_dir: Path) -> bool:
    """Whether the newest attempt's first process is alive on this machine."""
    note = read_attempt(run_dir, latest_attempt(run_dir))
    if note.get("host") != socket.gethostname() or "pid" not in note:
        return False
    try:
        command = Path(f"/proc/{int(note['pid'])}/cmdline").read_bytes()
    except OSError:
        return False
    return b"slurm.node.job" in command
