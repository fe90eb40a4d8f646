"""The command line called in this process, as its `main` is, with a limit of time."""

import io
import logging
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import typer.main

import run_stage
from stages.commands import finished_results, reproduction

LIMIT_S = 10.0
WAITING_S = 120.0
DOCUMENTED = (0, 1, 2, 75)


class Hang(BaseException):
    """A call took longer than it may."""


@dataclass(frozen=True)
class Called:
    """What a command printed, and its exit code.

    `complaint` is what is wrong with how it ended, whatever it was called for; "" if nothing is.
    """

    code: int
    out: str
    err: str
    seconds: float
    complaint: str = ""


def _find_complaint(code: int, out: str, err: str) -> str:
    if code not in DOCUMENTED:
        return f"exit code {code}: {err[-500:]}{_read_traceback(err)}"
    return f"a traceback: {err[-500:]}" if "Traceback" in out + err else ""


def _read_traceback(said: str) -> str:
    """Return the end of the traceback in the file that an internal error names; remove the file."""
    found = re.search(r"traceback in (\S+\.log)", said)
    if not found:
        return ""
    path = Path(found[1])
    text = path.read_text(errors="replace")
    path.unlink()
    return text[-700:]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang in the block after so many seconds of computing, or `WAITING_S` of waiting.

    On a busy machine a call may take long without being at fault; so waiting has another limit.
    """

    def ring(number: int, frame: object) -> None:
        raise Hang

    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, seconds),
        signal.ITIMER_REAL: (signal.SIGALRM, WAITING_S),
    }
    before = {number: signal.signal(number, ring) for number, _ in timers.values()}
    for timer, (_, limit) in timers.items():
        # Again each second, as somebody may catch what is raised.
        signal.setitimer(timer, limit, 1.0)
    try:
        yield
    finally:
        # Ignored first: one that comes right now would leave the timers on.
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Let the block set up logging as a new process does."""
    root = logging.getLogger()
    before, level = root.handlers, root.level
    root.handlers = []
    try:
        yield
    finally:
        root.handlers = before
        root.setLevel(level)


def call(*arguments: object, limit_s: float = LIMIT_S) -> Called:
    """Call the command line with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    code, escaped, began = 0, "", time.monotonic()
    argv = ["run_stage.py", *map(str, arguments)]
    with (
        _own_handlers(),
        patch.object(sys, "argv", argv),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            with time_limit(limit_s):
                run_stage.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Hang:
            escaped = f"no answer in {limit_s:g} s of computing, or {WAITING_S:g} s of waiting"
        except BaseException as error:
            escaped = f"escaped: {type(error).__name__}: {error}"
    said, complained = out.getvalue(), err.getvalue()
    complaint = escaped or _find_complaint(code, said, complained)
    return Called(code, said, complained, time.monotonic() - began, complaint)


def answer_as_idle_slurm(*command: str, **_: Any) -> tuple[int, str, str]:
    """Answer a command as a Slurm with an empty queue, which remembers no job."""
    if command[0] == "scontrol":
        return 1, "", "slurm_load_jobs error: Invalid job id specified"
    return 0, "", ""


@cache
def _plan(name: str, *options: object) -> list[Any]:
    return _all_runs(name, *options)


@cache
def _references() -> list[Any]:
    return _load_references()


_all_runs = reproduction.all_runs
_load_references = finished_results.load_references


@contextmanager
def fast_surroundings() -> Iterator[None]:
    """Keep between calls what takes seconds and depends on no file that is tested.

    The bundled reproductions are planned once and the options of the commands are read once, Slurm
    answers at once, and `doctor` starts no Python to see whether torch can be imported.
    """

    def plan(name: str, *options: Any) -> list[Any]:
        if Path(name).suffix:  # a file of the test
            return _all_runs(name, *options)
        return [*_plan(name, *(option or () for option in options))]

    with ExitStack() as stack:
        stack.enter_context(patch("typer.main.get_command", cache(typer.main.get_command)))
        stack.enter_context(patch("stages.commands.clean.all_runs", plan))
        stack.enter_context(patch("stages.commands.finished_results.load_references", _references))
        stack.enter_context(patch("slurm.shared.queue.call_slurm", answer_as_idle_slurm))
        stack.enter_context(
            patch("pipeline.environment.check_environment", lambda ffcv_required: [])
        )
        yield
