"""Views rendered by a pool of threads ahead of the consumer."""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image

from mugs.data.loading.batch import Batch
from mugs.data.loading.config import RendererName
from mugs.data.loading.order import SampleOrder
from mugs.data.sources.base import Source
from mugs.data.sources.decode import decode_rgb
from mugs.data.views.config import ViewRecipe
from mugs.data.views.plan import ViewPlan, draw_view_plan
from mugs.data.views.render import fast, reference

Render = Callable[[Image.Image, ViewPlan, np.ndarray, np.ndarray], None]
RENDERERS: dict[RendererName, Render] = {
    "fast": fast.render_views_compiled,
    "reference": reference.render_views_pil,
}


@dataclass(frozen=True)
class BatchRequest:
    """A batch to render: its global step, sample ids (N,), and the encoded image of a slot 0 ... N - 1."""

    step: int
    ids: np.ndarray
    read: Callable[[int], bytes]


class BatchBuffer:
    """Arrays of one batch, filled image by image; in page-locked memory where there is a GPU to copy to.

    torch keeps page-locked memory for reuse and hands it out again only when the copies to the device that read it are
    done, so that a new buffer per batch costs no allocation and needs no bookkeeping here.
    """

    def __init__(self, request: BatchRequest, recipe: ViewRecipe, render: Render) -> None:
        num, large, small = len(request.ids), recipe.large_size, recipe.small_size
        pinned = torch.cuda.is_available()
        self.request, self.render = request, render
        self.large = torch.empty(4, num, 3, large, large, dtype=torch.uint8, pin_memory=pinned)
        self.small = torch.empty(
            recipe.num_small, num, 3, small, small, dtype=torch.uint8, pin_memory=pinned
        )
        self.erase = torch.zeros(recipe.num_crops, num, 4, dtype=torch.int16)
        self.weak = torch.zeros(num, dtype=torch.bool)

    def draw(self, slot: int, image: Image.Image, plan: ViewPlan) -> None:
        """Render the views of one image into its slot."""
        self.render(image, plan, self.large[:, slot].numpy(), self.small[:, slot].numpy())
        self.erase[:, slot] = torch.tensor([crop.erase for crop in plan.crops])
        self.weak[slot] = plan.weak


class ThreadLoader:
    """A pool of threads renders the next `ahead` batches; an error in a worker is raised where its batch is due."""

    def __init__(
        self,
        source: Source,
        recipe: ViewRecipe,
        order: SampleOrder,
        *,
        seed: int,
        renderer: RendererName,
        threads: int,
        ahead: int,
    ) -> None:
        self.source, self.recipe, self.order, self.seed = source, recipe, order, seed
        self.render, self.threads, self.ahead = RENDERERS[renderer], threads, ahead
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="views")

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """This rank's batches of global steps start ... stop - 1."""
        queue: deque[tuple[BatchBuffer, list[Future[None]]]] = deque()
        with closing(self.requests(start, stop)) as requests:
            try:
                queue.extend(
                    self._submit(request) for request in itertools.islice(requests, self.ahead)
                )
                while queue:
                    yield self._collect(*queue.popleft())
                    queue.extend(self._submit(request) for request in itertools.islice(requests, 1))
            finally:
                for future in itertools.chain.from_iterable(futures for _, futures in queue):
                    future.cancel()

    def requests(self, start: int, stop: int) -> Generator[BatchRequest]:
        """What to render, in order; the encoded images are read by the threads that render them."""
        for step in range(start, stop):
            ids = self.order.indices(step)
            yield BatchRequest(step, ids, partial(self._read, ids))

    def _read(self, ids: np.ndarray, slot: int) -> bytes:
        return self.source.read(int(ids[slot]))

    def _submit(self, request: BatchRequest) -> tuple[BatchBuffer, list[Future[None]]]:
        buffer = BatchBuffer(request, self.recipe, self.render)
        return buffer, [
            self.pool.submit(self._fill, buffer, slot) for slot in range(len(request.ids))
        ]

    def _fill(self, buffer: BatchBuffer, slot: int) -> None:
        sample = int(buffer.request.ids[slot])
        image = decode_rgb(buffer.request.read(slot), self.source.describe(sample))
        epoch = buffer.request.step // self.order.steps_per_epoch
        plan = draw_view_plan(self.seed, epoch, sample, image.width, image.height, self.recipe)
        buffer.draw(slot, image, plan)

    def _collect(self, buffer: BatchBuffer, futures: list[Future[None]]) -> Batch:
        for future in futures:
            future.result()
        step, ids = buffer.request.step, buffer.request.ids
        return Batch(
            large=buffer.large,
            small=buffer.small,
            erase=buffer.erase,
            weak=buffer.weak,
            ids=torch.from_numpy(ids.astype(np.int64)),
            labels=torch.tensor([self.source.label(int(i)) for i in ids]),
            epoch=step // self.order.steps_per_epoch,
            step=step,
        )

    def close(self) -> None:
        """Stop all threads; nothing half-done is waited for longer than one image."""
        self.pool.shutdown(wait=True, cancel_futures=True)
