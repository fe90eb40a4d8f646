"""The loader's side of worker processes: they decode and render, away from the trainer's lock.

A trainer has one server process, which imports what workers need, and forks each worker. So a
worker starts in milliseconds, and none has seen a GPU. Nothing here, or in what it imports, imports
torch: it would take seconds and memory in every trainer.

A worker gets `sys.path`, a `WorkerSetup`, and then shares of batches, each of which it answers. It
ends when the trainer closes its end of the socket, so also when the trainer dies.
"""

import mmap
import os
import signal
import socket
import struct
import sys
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
from PIL import Image

from mugs.data.loading.drawing import CropSizes, Drawing, DrawnImage, Place, TrainingViews
from mugs.data.sources.base import StoredImage
from mugs.data.sources.decode import DecodeError, decode_rgb
from mugs.data.views.annotate import annotate_nothing
from mugs.data.views.config import ViewRecipe

# Signals that ask a trainer to stop. Slurm and a terminal send them to all processes, and a worker
# that ended would take away the last batches before the checkpoint.
IGNORED_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
NUMBER = struct.Struct("q")
# With these two arguments, `warm_kernels` calls nearly all kernels.
WARM_IMAGES = 20
WARM_RECIPE = ViewRecipe(large_size=32, small_size=16)


class ImageTask(NamedTuple):
    """An image to draw: its place in the batch, where it is stored, and how messages call it."""

    place: Place
    image: StoredImage
    description: str


class Share(NamedTuple):
    """What a worker has to do of a batch of `num` images, whose pixels go into a buffer."""

    ticket: int
    buffer: int
    num: int
    tasks: list[ImageTask]


class Answer(NamedTuple):
    """What became of the images of a share: by slot, what was drawn or the error. None: skipped."""

    ticket: int
    drawn: dict[int, DrawnImage | Exception | None]


class WorkerSetup(NamedTuple):
    """What a worker knows of its loader."""

    drawing: Drawing
    num_buffers: int
    max_images: int


class SharedMemory:
    """Buffers for the pixels of batches, which the trainer and its workers share.

    `skipped` holds, for each buffer, a ticket that nobody waits for any more.
    """

    def __init__(self, file: int, setup: WorkerSetup) -> None:
        self.sizes: CropSizes = setup.drawing.sizes
        memory = np.frombuffer(mmap.mmap(file, self.count_bytes(setup)), np.uint8)
        head = 8 * setup.num_buffers
        self.skipped = memory[:head].view(np.int64)
        self.buffers = memory[head:].reshape(setup.num_buffers, -1)

    @staticmethod
    def count_bytes(setup: WorkerSetup) -> int:
        """Return the bytes of all buffers."""
        buffer = setup.max_images * setup.drawing.sizes.bytes_per_image
        return setup.num_buffers * (8 + buffer)


def serve(control: int) -> None:
    """Fork workers until the trainer closes its end of the socket, given as its file number.

    A message with two files (a worker's socket and its memory) asks for a worker, and is answered
    by its process number. A process number asks to wait for that worker's end, and is answered by
    its exit code.
    """
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    warm_kernels()
    with socket.socket(fileno=control) as trainer:
        while True:
            message, files, _, _ = socket.recv_fds(trainer, NUMBER.size, 2)
            if not message:
                return
            if files:
                reply = os.fork()
                if reply == 0:
                    trainer.close()
                    run_and_exit(*files)
                for file in files:
                    os.close(file)
            else:
                (pid,) = NUMBER.unpack(message)
                _, status = os.waitpid(pid, 0)
                reply = os.waitstatus_to_exitcode(status)
            trainer.send(NUMBER.pack(reply))


def warm_kernels() -> None:
    """Load the compiled kernels, so that workers are forked with them."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    drawing = TrainingViews(WARM_RECIPE, 0, "fast", annotate_nothing)
    crops = drawing.sizes.split(np.empty(drawing.sizes.bytes_per_image, np.uint8), 1)
    for sample in range(WARM_IMAGES):
        drawing(image, Place(0, sample, 0), crops)


def run_and_exit(connection: int, memory: int) -> None:
    """Be a worker, and end the process; what it must not do is return to the server's loop."""
    code = 1
    try:
        run_worker(Connection(connection), memory)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def run_worker(connection: Connection, file: int) -> None:
    """Answer shares of batches until the trainer closes its end."""
    try:
        # What the setup refers to may be found only where the trainer finds it.
        sys.path[:] = connection.recv()
        setup = connection.recv()
        memory = SharedMemory(file, setup)
        while True:
            share = connection.recv()
            connection.send(draw_share(share, setup.drawing, memory))
    except (EOFError, ConnectionError):
        # The loader was closed, or the trainer died.
        pass


def draw_share(share: Share, drawing: Drawing, memory: SharedMemory) -> Answer:
    """Draw the images of a share into their buffer."""
    crops = memory.sizes.split(memory.buffers[share.buffer], share.num)
    drawn: dict[int, DrawnImage | Exception | None] = {}
    for place, stored, description in share.tasks:
        drawn[place.slot] = None
        if memory.skipped[share.buffer] != share.ticket:
            try:
                drawn[place.slot] = drawing(decode_rgb(stored.read(), description), place, crops)
            except Exception as error:
                # Raised by the trainer, when the batch is due. A bad file needs no traceback.
                if not isinstance(error, DecodeError | OSError):
                    error.add_note(f"in worker {os.getpid()}: {traceback.format_exc()}")
                drawn[place.slot] = error
    return Answer(share.ticket, drawn)
