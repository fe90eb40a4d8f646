"""FFCV front end: FFCV reads the images of a `.beton` file ahead, the thread loader's pool renders them.

Its batches are those of the thread loader, bit by bit. Stock FFCV's decoders, augmentations and orders are not used:
they decode once per view, resize with another filter and take their randomness from hidden state. What is replaced
here of FFCV 1.0.2 hangs, leaks or breaks in long runs; each place says how.

Importing ffcv and making its loader set the number of threads of the whole process: `make_loader` sets it back.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from queue import Empty
from typing import Any
from weakref import WeakSet

import ffcv.loader.loader
import numpy as np
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers import OSCacheManager
from ffcv.memory_managers.os_cache import OSCacheContext
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from ffcv.reader import Reader

from mugs.data.loading.config import RendererName
from mugs.data.loading.order import SampleOrder
from mugs.data.loading.thread_loader import BatchRequest, ThreadLoader
from mugs.data.sources.base import Source, SourceError
from mugs.data.sources.beton import BetonSource
from mugs.data.views.config import ViewRecipe

OS_PAGE = 4096


class FFCVLoader(ThreadLoader):
    """The thread loader with FFCV as its reader. Raises SourceError unless the source is a `.beton` file."""

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
        if not isinstance(source, BetonSource):
            raise SourceError(
                "loader 'ffcv' reads .beton files; convert the folder, or use loader: thread"
            )
        super().__init__(
            source, recipe, order, seed=seed, renderer=renderer, threads=threads, ahead=ahead
        )
        self.reader = make_reader(source, order.batch_size // order.world)
        check_image_table(source, self.reader.reader)
        self.reading: WeakSet[ReadAhead] = WeakSet()

    def requests(self, start: int, stop: int) -> Generator[BatchRequest]:
        """Batches of images that have been read into memory, epoch by epoch."""
        per_epoch = self.order.steps_per_epoch
        while start < stop:
            end = min(stop, start - start % per_epoch + per_epoch)
            ids = [self.order.indices(step) for step in range(start, end)]
            with closing(ReadAhead(self.reader, ids)) as batches:
                self.reading.add(batches)
                for step, chosen in zip(range(start, end), ids, strict=True):
                    yield BatchRequest(
                        step, chosen, partial(read_mapped_image, batches.file, next(batches))
                    )
            start = end

    def close(self) -> None:
        """Stop all threads, those of iterators that were not finished too."""
        for reader in list(self.reading):
            reader.close()
        super().close()


def read_mapped_image(file: np.ndarray, places: np.ndarray, slot: int) -> bytes:
    """The encoded image of a slot."""
    address, size = int(places[slot, 0]), int(places[slot, 1])
    return file[address : address + size].tobytes()


def make_reader(source: BetonSource, batch_size: int) -> Loader:
    """FFCV's loader over the file. Its memory manager is no argument of FFCV's, so the class is swapped meanwhile."""
    stock = ffcv.loader.loader.OSCacheManager
    ffcv.loader.loader.OSCacheManager = MappedFile
    try:
        return Loader(
            str(source.path),
            batch_size=batch_size,
            num_workers=1,
            os_cache=True,
            order=OrderOption.SEQUENTIAL,
            batches_ahead=1,
            pipelines={"image": PipelineSpec("image", decoder=LocateImage()), "label": None},
        )
    finally:
        ffcv.loader.loader.OSCacheManager = stock


def check_image_table(source: BetonSource, reader: Reader) -> None:
    """Refuse a file whose tables contradict each other: compiled code does not notice that it reads elsewhere."""
    table = reader.alloc_table
    same = np.array_equal(table["ptr"], source.samples["image"]["data_ptr"])
    same = same and np.array_equal(table["size"], np.asarray(source.sizes, dtype=np.uint64))
    if not same or int((table["ptr"] + table["size"]).max()) > source.sidecar.file_size:
        raise SourceError(f"{source.path}: its table of images is damaged; convert again")


class LocateImage(Operation):  # type: ignore[misc]
    """Reads each stored image into the page cache, without the GIL, and hands out where it lies.

    Rows are address, size and the sum of one byte per page, which is what makes the system read them. A place takes 24
    bytes; stock decoders reserve the largest image of the file for every sample of every buffer.
    """

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """One row per image."""
        kind = np.dtype("<u8")
        return replace(previous_state, jit_mode=True, shape=(3,), dtype=kind), AllocationQuery(
            (3,), kind
        )

    def generate_code(self) -> Callable[..., Any]:
        """The function FFCV compiles and calls with a batch."""

        def locate(batch_indices: Any, destination: Any, metadata: Any, storage_state: Any) -> Any:
            file, addresses, sizes = storage_state
            for row in range(len(batch_indices)):
                address = metadata[batch_indices[row]]["data_ptr"]
                size = sizes[np.searchsorted(addresses, address)]
                touched = np.uint64(0)
                for offset in range(0, size, OS_PAGE):
                    touched += np.uint64(file[address + np.uint64(offset)])
                destination[row, 0], destination[row, 1], destination[row, 2] = (
                    address,
                    size,
                    touched,
                )
            return destination

        return locate


class MappedFile(OSCacheManager):  # type: ignore[misc]
    """FFCV's memory map of the file, and nothing else of its memory manager.

    Stock: dictionaries of pages take 5 s and 600 MB per process for ImageNet, and compiling its reader changes a numba
    type that the whole process shares, so that functions compiled later fail with a KeyError.
    """

    def __init__(self, reader: Reader) -> None:
        order = np.argsort(reader.alloc_table["ptr"])
        self.reader, self.context = reader, OSCacheContext(self)
        self.ptrs, self.sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]

    def compile_reader(self) -> None:
        """Nothing to compile: `Located` finds the images itself."""


class ReadAhead(EpochIterator):  # type: ignore[misc]
    """FFCV's reading thread over given batches; gives the places of each.

    An error in it is raised where its batch is due (stock: the consumer waits for ever), and `close` ends the thread
    (stock: it lives on with its buffers).
    """

    def __init__(self, loader: Loader, batches: Sequence[np.ndarray]) -> None:
        self.error: BaseException | None = None
        super().__init__(loader, np.concatenate(batches).astype(np.uint64))
        self.file: np.ndarray = self.storage_state[0]

    def run(self) -> None:
        """Read batch after batch until told to stop; None is the end."""
        try:
            for number, ids in enumerate(self.iter_ixes):
                if self.terminate_event.is_set():
                    return
                slot = number % (self.loader.batches_ahead + 2)
                (places,) = self.run_pipeline(number, ids, slot, None)
                self.output_queue.put(places.copy())  # FFCV reuses its buffers
        except BaseException as error:  # handed to the consumer, who raises it
            self.error = error
        self.output_queue.put(None)

    def __next__(self) -> np.ndarray:
        places: np.ndarray | None = self.output_queue.get()
        if places is None:
            self.output_queue.put(None)
            raise self.error or StopIteration
        return places

    def close(self) -> None:
        """End the thread and wait for it; a consumer that still asks gets an error."""
        self.terminate_event.set()
        self.error = self.error or RuntimeError("the loader was closed")
        while self.is_alive():
            with suppress(Empty):
                self.output_queue.get(timeout=0.01)
        with suppress(Empty):
            self.output_queue.get_nowait()
        self.output_queue.put(None)

    def __del__(self) -> None:
        """Stock closes here, in whatever thread collects the garbage, even its own."""
