"""Render views with a pool of threads, ahead of the consumer.

Threads and not processes: decoding and the compiled renderer release the interpreter lock, and
results need no copy between processes.
"""

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
from mugs.data.views.plan import ViewPlan, plan_views
from mugs.data.views.render import fast, reference

Render = Callable[[Image.Image, ViewPlan, np.ndarray, np.ndarray], None]
RENDERERS: dict[RendererName, Render] = {
    "fast": fast.render_views_compiled,
    "reference": reference.render_views_pil,
}


@dataclass(frozen=True)
class BatchRequest:
    """A batch to render: global step, sample ids (N,), and a reader of the image of a slot."""

    step: int
    ids: np.ndarray
    read: Callable[[int], bytes]


class BatchBuffer:
    """The arrays of one batch, filled image by image; in page-locked memory if there is a GPU.

    torch keeps page-locked memory for reuse, and hands it out again only when the copies to the
    device that read it are done. So a new buffer for each batch costs no allocation and needs no
    bookkeeping here.
    """

    def __init__(self, request: BatchRequest, recipe: ViewRecipe, render: Render) -> None:
        num = len(request.ids)
        large = recipe.large_size
        small = recipe.small_size
        pinned = torch.cuda.is_available()
        self.request = request
        self.render = render
        self.large = torch.empty(4, num, 3, large, large, dtype=torch.uint8, pin_memory=pinned)
        self.small = torch.empty(
            recipe.num_small, num, 3, small, small, dtype=torch.uint8, pin_memory=pinned
        )
        self.erase = torch.zeros(recipe.num_crops, num, 4, dtype=torch.int16)
        self.weak = torch.zeros(num, dtype=torch.bool)

    def render_slot(self, slot: int, image: Image.Image, plan: ViewPlan) -> None:
        """Render the views of one image into its slot."""
        self.render(image, plan, self.large[:, slot].numpy(), self.small[:, slot].numpy())
        self.erase[:, slot] = torch.tensor([crop.erase for crop in plan.crops])
        self.weak[slot] = plan.weak


class ThreadLoader:
    """Loader of views whose threads work on the next `ahead` batches.

    An error in a thread is raised where its batch is due.
    """

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
        self.source = source
        self.recipe = recipe
        self.order = order
        self.seed = seed
        self.render = RENDERERS[renderer]
        self.ahead = ahead
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="views")

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield this rank's batches of the global steps `start` to `stop` - 1."""
        queue: deque[tuple[BatchBuffer, list[Future[None]]]] = deque()
        with closing(self.requests(start, stop)) as requests:
            try:
                queue.extend(map(self._submit, itertools.islice(requests, self.ahead)))
                while queue:
                    yield self._collect(*queue.popleft())
                    # One request for each batch that was taken, so that at most `ahead` are in
                    # memory.
                    queue.extend(map(self._submit, itertools.islice(requests, 1)))
            finally:
                # Also when the consumer stops early: what has not begun is not rendered any more.
                for future in itertools.chain.from_iterable(futures for _, futures in queue):
                    future.cancel()

    def requests(self, start: int, stop: int) -> Generator[BatchRequest]:
        """Yield what to render, in order; the threads that render an image also read it."""
        for step in range(start, stop):
            ids = self.order.indices(step)
            yield BatchRequest(step, ids, partial(self._read, ids))

    def _read(self, ids: np.ndarray, slot: int) -> bytes:
        return self.source.read(int(ids[slot]))

    def _submit(self, request: BatchRequest) -> tuple[BatchBuffer, list[Future[None]]]:
        buffer = BatchBuffer(request, self.recipe, self.render)
        slots = range(len(request.ids))
        return buffer, [self.pool.submit(self._fill, buffer, slot) for slot in slots]

    def _fill(self, buffer: BatchBuffer, slot: int) -> None:
        sample = int(buffer.request.ids[slot])
        image = decode_rgb(buffer.request.read(slot), self.source.describe(sample))
        epoch = buffer.request.step // self.order.steps_per_epoch
        # Drawn only now, as boxes depend on the size of the image.
        plan = plan_views(self.seed, epoch, sample, image.width, image.height, self.recipe)
        buffer.render_slot(slot, image, plan)

    def _collect(self, buffer: BatchBuffer, futures: list[Future[None]]) -> Batch:
        # Waits for the last image of the batch, and raises what went wrong in a thread.
        for future in futures:
            future.result()
        request = buffer.request
        return Batch(
            large=buffer.large,
            small=buffer.small,
            erase=buffer.erase,
            weak=buffer.weak,
            ids=torch.from_numpy(request.ids.astype(np.int64)),
            labels=torch.tensor([self.source.label(int(i)) for i in request.ids]),
            epoch=request.step // self.order.steps_per_epoch,
            step=request.step,
        )

    def close(self) -> None:
        """Stop all threads, each after the image that it works on."""
        self.pool.shutdown(wait=True, cancel_futures=True)
