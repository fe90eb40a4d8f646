"""FFCV front end: FFCV reads the encoded images of a `.beton` file ahead, the thread loader's pool renders them.

Its batches are those of the thread loader, bit by bit. Stock FFCV's decoders, augmentations and orders are not used:
they decode once per view, resize with another filter and take their randomness from hidden state. What is replaced
here of FFCV 1.0.2 hangs or breaks in long runs; each place says how.
"""

from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import replace
from queue import Full
from typing import Any

import ffcv.loader.loader
import numpy as np
import torch
from ffcv.libffcv import memcpy
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers import OSCacheManager
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from numba import types

from mugs.data.beton import PackSource
from mugs.data.loader import RendererName
from mugs.data.order import Order
from mugs.data.recipe import ViewRecipe
from mugs.data.source import Source, SourceError
from mugs.data.thread_loader import Request, ThreadLoader


class FFCVLoader(ThreadLoader):
    """The thread loader with FFCV as its reader. Raises SourceError unless the source is a `.beton` file."""

    def __init__(
        self,
        source: Source,
        recipe: ViewRecipe,
        order: Order,
        *,
        seed: int,
        renderer: RendererName,
        threads: int,
        ahead: int,
    ) -> None:
        if not isinstance(source, PackSource):
            raise SourceError("loader 'ffcv' reads .beton files; convert the folder, or use loader: thread")
        super().__init__(source, recipe, order, seed=seed, renderer=renderer, threads=threads, ahead=ahead)
        self.sizes = np.asarray(source.sizes)
        self.reader = make_reader(source, order.batch_size // order.world)

    def requests(self, start: int, stop: int) -> Generator[Request]:
        """Batches of encoded images, read epoch by epoch."""
        per_epoch = self.order.steps_per_epoch
        while start < stop:
            end = min(stop, start - start % per_epoch + per_epoch)
            ids = [self.order.indices(step) for step in range(start, end)]
            with closing(ReadAhead(self.reader, ids)) as batches:
                for step, chosen in zip(range(start, end), ids, strict=True):
                    yield Request(step, chosen, encoded(next(batches), self.sizes[chosen]))
            start = end


def encoded(rows: np.ndarray, sizes: np.ndarray) -> Callable[[int], bytes]:
    """Copies of the encoded images out of FFCV's buffer, which its next batches overwrite."""
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)].__getitem__


def make_reader(source: PackSource, batch_size: int) -> Loader:
    """FFCV's loader over the file, handing out encoded images.

    FFCV sets the number of threads of the whole process; it is set back.
    """
    threads = torch.get_num_threads()
    try:
        loader = Loader(
            str(source.path),
            batch_size=batch_size,
            num_workers=1,
            os_cache=True,
            order=OrderOption.SEQUENTIAL,
            batches_ahead=1,
            pipelines={"image": PipelineSpec("image", decoder=EncodedImage(max(source.sizes))), "label": None},
        )
    finally:
        torch.set_num_threads(threads)
    return loader


class EncodedImage(Operation):  # type: ignore[misc]
    """Hands out the stored bytes of each image, at the start of a row as long as the largest image."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """One row of bytes per image."""
        kind = np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=(self.row,), dtype=kind), AllocationQuery((self.row,), kind)

    def generate_code(self) -> Callable[..., Any]:
        """The function FFCV compiles and calls with a batch."""
        read, copy = self.memory_read, Compiler.compile(memcpy)

        def copy_out(batch_indices: Any, destination: Any, metadata: Any, storage_state: Any) -> Any:
            for row in range(len(batch_indices)):
                copy(read(metadata[batch_indices[row]]["data_ptr"], storage_state), destination[row])
            return destination

        return copy_out


class ReadOnlyCache(OSCacheManager):  # type: ignore[misc]
    """FFCV's memory map with array types of its own.

    FFCV changes the mutability of a numba type that the whole process shares, whose hash then differs: functions
    compiled later fail with a KeyError.
    """

    @property
    def state_type(self) -> types.Type:
        """File, addresses, sizes."""
        table = types.Array(types.uint64, 1, "C")
        return types.Tuple([types.Array(types.uint8, 1, "C", readonly=True), table, table])

    def compile_reader(self) -> Callable[..., Any]:
        """Address -> the bytes allocated there."""

        def read(address: Any, state: Any) -> Any:
            return state[0][address : address + state[2][np.searchsorted(state[1], address)]]

        signature = types.Array(types.uint8, 1, "C", readonly=True)(types.uint64, self.state_type)
        compiled: Callable[..., Any] = Compiler.compile(read, signature)
        return compiled


ffcv.loader.loader.OSCacheManager = ReadOnlyCache


class ReadAhead(EpochIterator):  # type: ignore[misc]
    """FFCV's reading thread over given batches.

    An error in it is raised where its batch is due (FFCV: the consumer waits for ever), and `close` ends the thread
    (FFCV: it lives on with its buffers).
    """

    def __init__(self, loader: Loader, batches: list[np.ndarray]) -> None:
        self.error: BaseException | None = None
        super().__init__(loader, np.concatenate(batches).astype(np.uint64))

    def run(self) -> None:
        """Read batch after batch until told to stop."""
        try:
            for number, ids in enumerate(self.iter_ixes):
                slot = number % (self.loader.batches_ahead + 2)
                if not self._hand_over(self.run_pipeline(number, ids, slot, None)):
                    return
        except BaseException as error:  # handed to the consumer, who raises it
            self.error = error
        self._hand_over(None)

    def _hand_over(self, batch: Any) -> bool:
        while not self.terminate_event.is_set():
            with suppress(Full):
                self.output_queue.put(batch, timeout=0.05)
                return True
        return False

    def __next__(self) -> np.ndarray:
        batch = self.output_queue.get()
        if batch is None:
            raise self.error or StopIteration
        rows: np.ndarray = batch[0]
        return rows

    def close(self) -> None:
        """End the thread and wait for it."""
        self.terminate_event.set()
        if self.is_alive():
            self.join()
