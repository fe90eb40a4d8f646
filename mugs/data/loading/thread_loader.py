"""Render views with a pool of threads, ahead of the consumer.

Threads and not processes: decoding and the compiled renderer release the interpreter lock, and
results need no copy between processes.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mugs.data.loading.batch import Batch
from mugs.data.loading.config import RendererName
from mugs.data.loading.order import SampleOrder
from mugs.data.sources.base import Source
from mugs.data.sources.decode import decode_rgb
from mugs.data.views.annotate import Annotate
from mugs.data.views.config import ViewRecipe
from mugs.data.views.plan import FIRST_SMALL_CROP, ViewPlan, plan_views
from mugs.data.views.render import fast, reference
from mugs.data.views.render.erase import (
    NO_NOISE,
    BoxNoise,
    ErasedBox,
    draw_box_noise,
    join_noise,
)
from mugs.random_streams import SampleStream, make_generator

Render = Callable[[Image.Image, ViewPlan, np.ndarray, np.ndarray], None]
RENDERERS: dict[RendererName, Render] = {
    "fast": fast.render_views_compiled,
    "reference": reference.render_views_pil,
}


ReadSlot = Callable[[int], bytes]
"""Returns the encoded image of a slot of a batch."""
BatchRequest = tuple[int, np.ndarray, ReadSlot]
"""A batch to render: global step, sample ids (N,) and how to read its images."""


@dataclass(frozen=True)
class FilledSlot:
    """What a thread made of an image besides its pixels: annotations by name, and noise."""

    annotations: dict[str, np.ndarray]
    noise: BoxNoise


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
        annotate: Annotate,
    ) -> None:
        self.source = source
        self.recipe = recipe
        self.order = order
        self.seed = seed
        self.render = RENDERERS[renderer]
        self.ahead = ahead
        self.annotate = annotate
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="views")

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield this rank's batches of the global steps `start` to `stop` - 1."""
        queue: deque[tuple[Batch, list[Future[FilledSlot]]]] = deque()
        with closing(self.requests(start, stop)) as requests:
            submitted = itertools.starmap(self._submit, requests)
            try:
                queue.extend(itertools.islice(submitted, self.ahead))
                while queue:
                    # No local name holds the batch: its memory is free once the consumer drops it.
                    yield _wait_until_filled(*queue.popleft())
                    # One request for each batch that was taken, so that at most `ahead` are in
                    # memory.
                    queue.extend(itertools.islice(submitted, 1))
            finally:
                # Also when the consumer stops early: what has not begun is not rendered any more.
                for future in itertools.chain.from_iterable(futures for _, futures in queue):
                    future.cancel()

    def requests(self, start: int, stop: int) -> Generator[BatchRequest]:
        """Yield what to render, in order; the threads that render an image also read it."""
        for step in range(start, stop):
            ids = self.order.indices(step)
            yield step, ids, partial(self._read, ids)

    def _read(self, ids: np.ndarray, slot: int) -> bytes:
        return self.source.read(int(ids[slot]))

    def _submit(
        self, step: int, ids: np.ndarray, read: ReadSlot
    ) -> tuple[Batch, list[Future[FilledSlot]]]:
        """Return a batch, still empty, and the work in the threads that fills it."""
        recipe = self.recipe
        num = len(ids)
        # torch keeps page-locked memory for reuse, and hands it out again only when the copies to
        # the device that read it are done. So new arrays for each batch cost no allocation and need
        # no bookkeeping here.
        empty = partial(torch.empty, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        batch = Batch(
            large=empty(recipe.num_large, num, 3, recipe.large_size, recipe.large_size),
            small=empty(recipe.num_small, num, 3, recipe.small_size, recipe.small_size),
            # Their sizes are known when the images have been rendered.
            noise=NO_NOISE,
            extras={},
            ids=torch.from_numpy(ids.astype(np.int64)),
            labels=torch.tensor([self.source.label(int(i)) for i in ids]),
            epoch=step // self.order.steps_per_epoch,
            step=step,
        )
        return batch, [self.pool.submit(self._fill, batch, read, slot) for slot in range(num)]

    def _fill(self, batch: Batch, read: ReadSlot, slot: int) -> FilledSlot:
        """Render the image of a slot into the batch; return what else is made of it."""
        sample = int(batch.ids[slot])
        image = decode_rgb(read(slot), self.source.describe(sample))
        # Drawn only now, as boxes depend on the size of the image.
        plan = plan_views(self.seed, batch.epoch, sample, image.width, image.height, self.recipe)
        self.render(image, plan, batch.large[:, slot].numpy(), batch.small[:, slot].numpy())
        noise = draw_box_noise(
            self.seed, batch.epoch, sample, list_erased_boxes(batch.large, batch.small, plan, slot)
        )
        rng = make_generator(self.seed, batch.epoch, sample, SampleStream.ANNOTATIONS)
        return FilledSlot(self.annotate(rng, plan, batch.epoch), noise)

    def close(self) -> None:
        """Stop all threads, each after the image that it works on."""
        self.pool.shutdown(wait=True, cancel_futures=True)


def list_erased_boxes(large: Tensor, small: Tensor, plan: ViewPlan, slot: int) -> list[ErasedBox]:
    """Return the erased boxes of the image in a slot, and where in the batch its crops are."""
    erased = []
    for index, crop in enumerate(plan.crops):
        if crop.erase[2] > 0:
            is_small = index >= len(large)
            group, place = (small, index - len(large)) if is_small else (large, index)
            number = FIRST_SMALL_CROP + place if is_small else place
            first = large.numel() if is_small else 0
            start = first + place * group.stride(0) + slot * group.stride(1)
            erased.append(ErasedBox(number, crop.erase, start, crop.size))
    return erased


def _wait_until_filled(batch: Batch, futures: list[Future[FilledSlot]]) -> Batch:
    # Waits for the last image of the batch, and raises what went wrong in a thread.
    filled = [future.result() for future in futures]
    names = filled[0].annotations
    extras = {name: np.stack([slot.annotations[name] for slot in filled]) for name in names}
    return replace(
        batch,
        noise=join_noise([slot.noise for slot in filled]),
        extras={name: torch.from_numpy(x) for name, x in extras.items()},
    )
