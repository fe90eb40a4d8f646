"""Batches of views in the exact order of `Order`, rendered by a pool of threads ahead of the consumer."""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mugs.data.decode import decode_rgb
from mugs.data.order import Order
from mugs.data.plan import draw_plan, erase_array
from mugs.data.recipe import ViewRecipe
from mugs.data.render.reference import render
from mugs.data.source import Source

LoaderName = Literal["auto", "thread"]


@dataclass(frozen=True)
class Batch:
    """Views of N images of one rank, crop-major, as bytes.

    large (4, N, 3, S, S): teacher 0, teacher 1, student 0, student 1; small (P, N, 3, s, s); erase (4 + P, N, 4) boxes
    x, y, w, h with w = 0 for none; weak (N,): the large student crops are weak; ids and labels (N,).
    """

    large: Tensor
    small: Tensor
    erase: Tensor
    weak: Tensor
    ids: Tensor
    labels: Tensor
    epoch: int
    step: int


class ViewLoader(Protocol):
    """A front end: any of them gives the same batches."""

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """This rank's batches of global steps start ... stop - 1."""

    def close(self) -> None:
        """Stop all threads."""


def make_loader(
    source: Source,
    recipe: ViewRecipe,
    order: Order,
    *,
    seed: int,
    loader: LoaderName = "auto",
    threads: int = 2,
    ahead: int = 3,
) -> ViewLoader:
    """The front end by name; "auto" is the thread loader, which reads folders and `.beton` files alike."""
    return ThreadLoader(source, recipe, order, seed=seed, threads=threads, ahead=ahead)


class BatchBuffer:
    """Arrays of one batch, filled image by image."""

    def __init__(self, num: int, recipe: ViewRecipe) -> None:
        self.large = np.empty((4, num, 3, recipe.large_size, recipe.large_size), dtype=np.uint8)
        self.small = np.empty((recipe.num_small, num, 3, recipe.small_size, recipe.small_size), dtype=np.uint8)
        self.erase = np.zeros((recipe.num_crops, num, 4), dtype=np.int16)
        self.weak = np.zeros(num, dtype=np.bool_)

    def batch(self, ids: np.ndarray, labels: np.ndarray, epoch: int, step: int) -> Batch:
        """The arrays as tensors, without a copy."""
        return Batch(
            large=torch.from_numpy(self.large),
            small=torch.from_numpy(self.small),
            erase=torch.from_numpy(self.erase),
            weak=torch.from_numpy(self.weak),
            ids=torch.from_numpy(ids.astype(np.int64)),
            labels=torch.from_numpy(labels.astype(np.int64)),
            epoch=epoch,
            step=step,
        )


def render_sample(
    source: Source, recipe: ViewRecipe, seed: int, epoch: int, sample: int, buffer: BatchBuffer, slot: int
) -> None:
    """Decode, plan and render one sample into a slot. Raises DecodeError naming it."""
    image = decode_rgb(source.read(sample), source.describe(sample))
    plan = draw_plan(seed, epoch, sample, image.width, image.height, recipe)
    render(image, plan, buffer.large[:, slot], buffer.small[:, slot])
    buffer.erase[:, slot] = erase_array(plan)
    buffer.weak[slot] = plan.weak


class ThreadLoader:
    """A pool of threads renders the next `ahead` batches; an error in a worker is raised where its batch is due."""

    def __init__(
        self, source: Source, recipe: ViewRecipe, order: Order, *, seed: int, threads: int, ahead: int
    ) -> None:
        self.source, self.recipe, self.order, self.seed = source, recipe, order, seed
        self.threads, self.ahead = threads, ahead
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="views")

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """This rank's batches of global steps start ... stop - 1."""
        queue: deque[tuple[int, np.ndarray, BatchBuffer, list[Future[None]]]] = deque()
        steps = iter(range(start, stop))
        try:
            for step in itertools.islice(steps, self.ahead):
                queue.append(self._submit(step))
            while queue:
                yield self._collect(*queue.popleft())
                queue.extend(self._submit(step) for step in itertools.islice(steps, 1))
        finally:
            for _, _, _, futures in queue:
                for future in futures:
                    future.cancel()

    def _submit(self, step: int) -> tuple[int, np.ndarray, BatchBuffer, list[Future[None]]]:
        ids = self.order.indices(step)
        buffer = BatchBuffer(len(ids), self.recipe)
        slots = np.array_split(np.arange(len(ids)), min(len(ids), 2 * self.threads))
        epoch = step // self.order.steps_per_epoch
        return step, ids, buffer, [self.pool.submit(self._fill, epoch, ids, buffer, part) for part in slots]

    def _fill(self, epoch: int, ids: np.ndarray, buffer: BatchBuffer, slots: np.ndarray) -> None:
        for slot in slots:
            render_sample(self.source, self.recipe, self.seed, epoch, int(ids[slot]), buffer, int(slot))

    def _collect(self, step: int, ids: np.ndarray, buffer: BatchBuffer, futures: list[Future[None]]) -> Batch:
        for future in futures:
            future.result()
        labels = np.array([self.source.label(int(i)) for i in ids])
        return buffer.batch(ids, labels, step // self.order.steps_per_epoch, step)

    def close(self) -> None:
        """Stop all threads; nothing half-done is waited for longer than one image."""
        self.pool.shutdown(wait=True, cancel_futures=True)
