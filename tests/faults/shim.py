"""Calls that change a disk, intercepted: to count them, to make the N-th fail,
or to end the process there.

Covered is what Python code calls: os.open for writing, os.write, fsync, rename, replace, mkdir,
unlink, rmdir, and files from open() and Path.open() that are written.
"""

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

NAMES = ("write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
Action = Callable[[int, str, str], None]
"""Called before each intercepted call with its number from 1, name and path; what it raises, the
call raises.
"""


class Crash(BaseException):
    """The process is gone: no handler of errors sees this, and no clean-up happens."""


class TornWrite(BaseException):
    """Of this write only the first half arrives, then the process is gone."""


class Calls:
    """Counts calls; `action` decides what becomes of each."""

    def __init__(self, action: Action) -> None:
        self.action, self.log = action, list[tuple[str, str]]()

    def seen(self, name: str, path: Any) -> None:
        """One call is about to be made."""
        self.log.append((name, str(path)))
        try:
            self.action(len(self.log), name, str(path))
        except TornWrite:
            if name == "write" and isinstance(path, int):
                raise
            raise Crash from None


@contextmanager
def intercepted(action: Action = lambda number, name, path: None) -> Iterator[Calls]:
    """Within the block `action` is asked before each call."""
    calls = Calls(action)
    real_open, real_io_open = os.open, io.open

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                calls.seen(name, first)
            except TornWrite:
                real(first, args[0][: len(args[0]) // 2])
                raise Crash from None
            return real(first, *args, **kwargs)

        return call

    def open_descriptor(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            calls.seen("open", path)
        return real_open(path, flags, *args, **kwargs)

    class Raw(io.FileIO):
        """A file whose writes are asked for first."""

        def write(self, data: Any) -> int:
            calls.seen("write", self.name)
            return super().write(data) or 0

    def open_file(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not set(mode) & set("wax") or "+" in mode or isinstance(file, int):
            return real_io_open(file, mode, *args, **options)
        calls.seen("open", file)
        buffered = io.BufferedWriter(Raw(file, mode.replace("b", "").replace("t", "")))
        return (
            buffered
            if "b" in mode
            else io.TextIOWrapper(buffered, "utf-8", newline=options.get("newline"))
        )

    with (
        patch.multiple(os, **{name: wrap(name) for name in NAMES} | {"open": open_descriptor}),
        patch.object(io, "open", open_file),
        patch.object(builtins, "open", open_file),
    ):
        yield calls


def dead_after(count: int, *, torn: bool = False) -> Action:
    """`count` calls are made, every later one raises Crash. `torn`:
    when the first of these writes, half arrives.
    """

    def action(number: int, name: str, path: str) -> None:
        if number > count:
            raise TornWrite if torn and number == count + 1 else Crash

    return action


def exit_after(count: int) -> Action:
    """`count` calls are made, at the next the process is gone."""

    def action(number: int, name: str, path: str) -> None:
        if number > count:
            os._exit(9)

    return action


def failing(number: int, code: int, *, lasting: bool = False) -> Action:
    """The call of this number, from 1, raises OSError; `lasting`:
    the later ones that need room do too.
    """

    def action(made: int, name: str, path: str) -> None:
        needs_room = name in ("open", "write", "fsync", "mkdir")
        if made == number or (lasting and made > number and needs_room):
            raise OSError(code, os.strerror(code), path)

    return action
