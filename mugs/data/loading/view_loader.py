"""Batches of views, drawn by worker processes ahead of the consumer.

Processes and not threads: of the 12 ms that an image takes, 3 would hold the interpreter lock of
the trainer, which launches the kernels of the training step meanwhile.
"""

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple, Protocol

import numpy as np
import torch

from mugs.data.loading.batch import Batch, make_box_noise
from mugs.data.loading.drawing import Drawing, Place
from mugs.data.loading.worker import ImageTask
from mugs.data.loading.worker_pool import Ticket, WorkerPool
from mugs.data.sources.base import Source, StoredImage


class BatchOrder(Protocol):
    """Which samples are in which batch (`mugs.data.loading.order`)."""

    steps_per_epoch: int

    @property
    def max_images(self) -> int:
        """Return the size of the largest batch."""

    def indices(self, step: int) -> np.ndarray:
        """Return the samples of a step."""


class BatchRequest(NamedTuple):
    """A batch to draw: global step, sample ids (N,) and where their images are stored."""

    step: int
    ids: np.ndarray
    images: Iterable[StoredImage]


class ViewLoader:
    """Loader of views whose workers draw the next `ahead` batches.

    An error in a worker is raised where its batch is due, and so is the end of a worker.
    """

    def __init__(
        self, source: Source, order: BatchOrder, drawing: Drawing, *, workers: int, ahead: int
    ) -> None:
        self.source = source
        self.order = order
        self.sizes = drawing.sizes
        self.ahead = ahead
        self.pool = WorkerPool(
            drawing, num_workers=workers, num_buffers=ahead, max_images=order.max_images
        )
        # Collects batches in the order of their submission, mostly waiting and copying.
        self.collector = ThreadPoolExecutor(1, thread_name_prefix="views")
        self.closed = False

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield this rank's batches of the global steps `start` to `stop` - 1."""
        queue: deque[tuple[Ticket, Future[Batch]]] = deque()
        with closing(self.requests(start, stop)) as requests:
            submitted = map(self._submit, requests)
            try:
                queue.extend(itertools.islice(submitted, self.ahead))
                while queue:
                    # No local name holds the batch: its memory is free once the consumer drops it.
                    yield queue.popleft()[1].result()
                    # One request for each batch that was taken, so that at most `ahead` are in
                    # memory.
                    queue.extend(itertools.islice(submitted, 1))
            finally:
                # Also when the consumer stops early: what has not begun is not drawn any more.
                for ticket, _ in queue:
                    self.pool.skip(ticket)

    def requests(self, start: int, stop: int) -> Generator[BatchRequest]:
        """Yield what to draw, in order; the workers that draw an image also read it."""
        for step in range(start, stop):
            ids = self.order.indices(step)
            yield BatchRequest(step, ids, [self.source.locate(int(i)) for i in ids])

    def _submit(self, request: BatchRequest) -> tuple[Ticket, Future[Batch]]:
        """Let the workers draw a batch and the collector wait for it."""
        if self.closed:
            raise RuntimeError("the loader was closed")
        step, ids, images = request
        epoch = step // self.order.steps_per_epoch
        tasks = [
            ImageTask(Place(slot, int(sample), epoch), image, self.source.describe(int(sample)))
            for slot, (sample, image) in enumerate(zip(ids, images, strict=True))
        ]
        labels = torch.tensor([self.source.label(int(i)) for i in ids])
        ticket = self.pool.submit(tasks)
        return ticket, self.collector.submit(self._collect, ticket, step, ids, labels)

    def _collect(self, ticket: Ticket, step: int, ids: np.ndarray, labels: torch.Tensor) -> Batch:
        # torch keeps page-locked memory for reuse, and hands it out again only when the copies to
        # the device that read it are done. So a batch is copied once, by this thread, out of the
        # memory of the workers, and after that nobody has to know who still reads it.
        pixels = torch.empty(
            ticket.num * self.sizes.bytes_per_image,
            dtype=torch.uint8,
            pin_memory=torch.cuda.is_available(),
        )
        drawn = self.pool.collect(ticket, pixels.numpy())
        crops = self.sizes.split(pixels.numpy(), ticket.num)
        names = drawn[0].annotations
        extras = {name: np.stack([image.annotations[name] for image in drawn]) for name in names}
        return Batch(
            large=pixels[: crops.large.size].view(crops.large.shape),
            small=pixels[crops.large.size :].view(crops.small.shape),
            noise=make_box_noise([image.boxes for image in drawn]),
            extras={name: torch.from_numpy(value) for name, value in extras.items()},
            ids=torch.from_numpy(ids.astype(np.int64)),
            labels=labels,
            epoch=step // self.order.steps_per_epoch,
            step=step,
        )

    def close(self) -> None:
        """End the workers, whatever they do."""
        self.closed = True
        # Without workers, the collector ends with an error that nobody sees any more.
        self.pool.close()
        self.collector.shutdown(wait=True, cancel_futures=True)
