"""Child processes that share what is imported already: a fault in one is gone with it,
and it starts at once.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable


def start(work: Callable[[], int | None]) -> int:
    """Fork a process that does some work and exits with what it returns (0),
    or 99 after an exception; its id.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    """A port of this machine that nothing listens to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def end(process: int) -> int:
    """Wait for a process; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(work: Callable[[], int | None]) -> int:
    """Exit code of some work done in a process of its own."""
    return end(start(work))
