"""The trainer's side of worker processes: start them, hand out shares of batches, take answers."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from mugs.data.loading.drawing import Drawing, DrawnImage
from mugs.data.loading.worker import (
    NUMBER,
    Answer,
    ImageTask,
    Share,
    SharedMemory,
    WorkerSetup,
)


class WorkerError(RuntimeError):
    """A worker process ended; the message names it and how it ended."""


class WorkerServer:
    """The process that workers are forked from; `mugs.data.loading.worker.serve` runs in it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The path comes first: the server must not find another copy of this code than the
        # trainer did.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from mugs.data.loading.worker import serve; serve({theirs.fileno()})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )
        self.control = ours
        self.lock = threading.Lock()
        theirs.close()

    def fork(self, connection: Connection, memory: int) -> int:
        """Start a worker with its end of a socket and the shared memory; return its process id."""
        return self._ask(0, [connection.fileno(), memory])

    def wait(self, pid: int) -> int:
        """Wait for the end of a worker and return its exit code, negative for a signal."""
        return self._ask(pid, [])

    def _ask(self, number: int, files: Sequence[int]) -> int:
        with self.lock, suppress(ConnectionError):
            socket.send_fds(self.control, [NUMBER.pack(number)], files)
            if reply := self.control.recv(NUMBER.size):
                return int(NUMBER.unpack(reply)[0])
        raise WorkerError(
            f"the server of the loader's workers (process {self.process.pid}) ended with exit code "
            f"{self.process.wait()}; its last words are in the log above"
        )


_servers: dict[int, WorkerServer] = {}


def find_server() -> WorkerServer:
    """Return the worker server of this process, started at the first call."""
    # By process, as a forked child must not share its parent's socket.
    server = _servers.get(os.getpid())
    if server is None or server.process.poll() is not None:
        server = _servers[os.getpid()] = WorkerServer()
    return server


class Worker:
    """A worker process and our end of its socket."""

    def __init__(self, server: WorkerServer, memory: int, setup: bytes) -> None:
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        with Connection(theirs.detach()) as other_end:
            self.pid = server.fork(other_end, memory)
        self.server = server
        self.code: int | None = None
        # A worker that is gone already shows where its first answer is due.
        with suppress(ConnectionError):
            self.connection.send(sys.path)
            self.connection.send_bytes(setup)

    def wait(self) -> int:
        """Wait for its end and return the exit code."""
        if self.code is None:
            self.code = self.server.wait(self.pid)
        return self.code


def stop_workers(workers: Sequence[Worker]) -> None:
    """End workers at once: they hold nothing that is of use without the trainer."""
    for worker in workers:
        worker.connection.close()
        if worker.code is None:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
    for worker in workers:
        # The server is gone only if somebody killed it; its workers then are no children of ours.
        with suppress(WorkerError):
            worker.wait()


def copy_pixels(buffer: np.ndarray, out: np.ndarray) -> None:
    """Copy the start of a buffer; numpy gives the interpreter lock away meanwhile."""
    out[:] = buffer[: len(out)]


class Ticket(NamedTuple):
    """A batch of `num` images that workers are drawing into a buffer, in `shares` parts."""

    number: int
    buffer: int
    num: int
    shares: int


class WorkerPool:
    """Worker processes that draw batches into memory shared with this process.

    Batches are handed out by one thread (`submit`) and collected by one other, in any order.
    """

    def __init__(
        self, drawing: Drawing, *, num_workers: int, num_buffers: int, max_images: int
    ) -> None:
        setup = WorkerSetup(drawing, num_buffers, max_images)
        server = find_server()
        # Memory without a name: it is gone with the last process that has it, and the size of
        # /dev/shm, often small in containers, is no limit.
        file = os.memfd_create("mugs-views")
        try:
            os.truncate(file, SharedMemory.count_bytes(setup))
            self.memory = SharedMemory(file, setup)
            message = pickle.dumps(setup)
            self.workers = [Worker(server, file, message) for _ in range(num_workers)]
        finally:
            os.close(file)
        # Also when the pool is forgotten, or the interpreter ends, without `close`.
        self.close = weakref.finalize(self, stop_workers, self.workers)
        self.free: SimpleQueue[int] = SimpleQueue()
        for buffer in range(num_buffers):
            self.free.put(buffer)
        self.answers: dict[int, list[Answer]] = {}
        self.next_ticket = 1
        self.next_worker = 0

    def submit(self, tasks: Sequence[ImageTask]) -> Ticket:
        """Hand a batch to the workers, waiting for a free buffer if there is none."""
        buffer = self.free.get()
        number = self.next_ticket
        self.next_ticket += 1
        workers = len(self.workers)
        # In turn, beginning with the worker after the last one: in batches that do not divide by
        # the number of workers, all get equally much in the long run.
        shares = [tasks[first::workers] for first in range(min(workers, len(tasks)))]
        self.answers[number] = []
        for offset, share in enumerate(shares):
            worker = self.workers[(self.next_worker + offset) % workers]
            # A worker that is gone is reported where its answer is due.
            with suppress(ConnectionError):
                worker.connection.send(Share(number, buffer, len(tasks), list(share)))
        self.next_worker = (self.next_worker + len(tasks)) % workers
        return Ticket(number, buffer, len(tasks), len(shares))

    def skip(self, ticket: Ticket) -> None:
        """Let workers leave out what they have not begun of a batch."""
        self.memory.skipped[ticket.buffer] = ticket.number

    def collect(self, ticket: Ticket, pixels: np.ndarray) -> list[DrawnImage]:
        """Wait for a batch, copy its pixels into memory of the caller, and return the rest.

        Raises WorkerError if a worker has ended, and what went wrong with the first bad image.
        """
        try:
            while len(self.answers[ticket.number]) < ticket.shares:
                self._receive()
            copy_pixels(self.memory.buffers[ticket.buffer], pixels)
        finally:
            answers = self.answers.pop(ticket.number)
            self.free.put(ticket.buffer)
        drawn: list[DrawnImage] = []
        for _, image in sorted(pair for answer in answers for pair in answer.drawn.items()):
            if isinstance(image, Exception):
                raise image
            if image is not None:
                drawn.append(image)
        return drawn

    def _receive(self) -> None:
        """Take every answer that is there, also those of other batches; wait for one."""
        owners = {worker.connection: worker for worker in self.workers}
        for connection in wait(list(owners)):
            worker = owners[connection]  # type: ignore[index]
            try:
                answer = worker.connection.recv()
            except (EOFError, ConnectionError):
                raise self._explain_end(worker) from None
            # Nobody waits for a batch that another worker's end has broken off.
            if answer.ticket in self.answers:
                self.answers[answer.ticket].append(answer)

    def _explain_end(self, worker: Worker) -> WorkerError:
        code = worker.wait()
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        hint = "its last words are in the log above"
        if code == -signal.SIGKILL:
            hint = "perhaps for want of memory: ask for more, or set fewer loader threads"
        number = self.workers.index(worker) + 1
        return WorkerError(
            f"loader worker {number} of {len(self.workers)} (process {worker.pid}) {how}; {hint}"
        )
