"""FFCV loader: FFCV reads images of a `.beton` file ahead, the workers of the loader draw them.

Its batches are those of the other loader, bit by bit. FFCV's own decoders, augmentations and
orders are not used: they decode once per view, resize with another filter and take their randomness
from hidden state. The classes below replace parts of FFCV 1.0.2 that hang, leak or break in long
runs; each one says what and why.

Importing ffcv and making its loader set the number of threads of the whole process; `make_loader`
restores it.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
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

from mugs.data.loading.drawing import Drawing
from mugs.data.loading.view_loader import BatchOrder, BatchRequest, ViewLoader
from mugs.data.sources.base import FilePart, Source, SourceError
from mugs.data.sources.beton import BetonSource

OS_PAGE = 4096


class FFCVLoader(ViewLoader):
    """The loader with FFCV as its reader. Raises SourceError for a folder."""

    def __init__(
        self, source: Source, order: BatchOrder, drawing: Drawing, *, workers: int, ahead: int
    ) -> None:
        if not isinstance(source, BetonSource):
            raise SourceError(
                "loader 'ffcv' reads .beton files; convert the folder, or use loader: thread"
            )
        super().__init__(source, order, drawing, workers=workers, ahead=ahead)
        self.path = str(source.path)
        self.reader = make_reader(source, order.max_images)
        check_image_table(source, self.reader.reader)
        self.reading: WeakSet[ReadAhead] = WeakSet()

    def requests(self, start: int, stop: int) -> Generator[BatchRequest]:
        """Yield batches of images that have been read into the page cache, epoch by epoch."""
        per_epoch = self.order.steps_per_epoch
        while start < stop:
            end = min(stop, start - start % per_epoch + per_epoch)
            ids = [self.order.indices(step) for step in range(start, end)]
            with closing(ReadAhead(self.reader, ids)) as batches:
                self.reading.add(batches)
                for step, chosen in zip(range(start, end), ids, strict=True):
                    yield BatchRequest(step, chosen, self._locate(next(batches)))
            start = end

    def _locate(self, places: np.ndarray) -> list[FilePart]:
        """Return the parts of the file that rows of `LocateImage` tell."""
        return [FilePart(self.path, int(start), int(size)) for start, size in places[:, :2]]

    def close(self) -> None:
        """End workers and threads, those of unfinished iterators too."""
        for reader in list(self.reading):
            reader.close()
        super().close()


def make_reader(source: BetonSource, batch_size: int) -> Loader:
    """Return FFCV's loader over the file."""
    # The memory manager is no argument of FFCV's loader, so the class is swapped while it is made.
    stock = ffcv.loader.loader.OSCacheManager
    ffcv.loader.loader.OSCacheManager = MappedFile
    try:
        return Loader(
            str(source.path),
            batch_size=batch_size,
            num_workers=1,
            os_cache=True,
            # `ReadAhead` hands in the order.
            order=OrderOption.SEQUENTIAL,
            batches_ahead=1,
            pipelines={"image": PipelineSpec("image", decoder=LocateImage()), "label": None},
        )
    finally:
        ffcv.loader.loader.OSCacheManager = stock


def check_image_table(source: BetonSource, reader: Reader) -> None:
    """Raise SourceError if the tables of the file contradict each other."""
    # FFCV's compiled code trusts the table: with a damaged one it would read elsewhere, without an
    # error.
    table = reader.alloc_table
    size = np.uint64(source.sidecar.file_size)
    if (
        not np.array_equal(table["ptr"], source.samples["image"]["data_ptr"])
        or not np.array_equal(table["size"], np.asarray(source.sizes, dtype=np.uint64))
        # Not by the sum of both, which begins at 0 again beyond 2**64.
        or (table["ptr"] > size).any()
        or (table["size"] > size - table["ptr"]).any()
    ):
        raise SourceError(f"{source.path}: its table of images is damaged; convert again")


class LocateImage(Operation):  # type: ignore[misc]
    """FFCV "decoder" that reads each image into the page cache and returns where it lies.

    A row holds address, size and the sum of one byte per page. To read these bytes is what makes
    the system load the pages, and compiled code does it without the interpreter lock. A row takes
    24 bytes; FFCV's decoders reserve the largest image of the file for every sample of every
    buffer.
    """

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """Declare one row per image."""
        kind = np.dtype("<u8")
        state = replace(previous_state, jit_mode=True, shape=(3,), dtype=kind)
        return state, AllocationQuery((3,), kind)

    def generate_code(self) -> Callable[..., Any]:
        """Return the function that FFCV compiles and calls with a batch."""

        def locate(batch_indices: Any, destination: Any, metadata: Any, storage_state: Any) -> Any:
            file, addresses, sizes = storage_state
            for row in range(len(batch_indices)):
                address = metadata[batch_indices[row]]["data_ptr"]
                size = sizes[np.searchsorted(addresses, address)]
                touched = np.uint64(0)
                for offset in range(0, size, OS_PAGE):
                    touched += np.uint64(file[address + np.uint64(offset)])
                destination[row, 0] = address
                destination[row, 1] = size
                # Stored so that the compiler cannot leave out the reads.
                destination[row, 2] = touched
            return destination

        return locate


class MappedFile(OSCacheManager):  # type: ignore[misc]
    """FFCV's memory map of the file, and nothing else of its memory manager.

    FFCV: dictionaries of pages take 5 s and 600 MB per process for ImageNet, and compiling its
    reader changes a numba type that the whole process shares, so that functions compiled later fail
    with a KeyError.
    """

    def __init__(self, reader: Reader) -> None:
        order = np.argsort(reader.alloc_table["ptr"])
        self.reader = reader
        self.context = OSCacheContext(self)
        # Sorted by address, for the binary search of `LocateImage`.
        self.ptrs = reader.alloc_table["ptr"][order]
        self.sizes = reader.alloc_table["size"][order]

    def compile_reader(self) -> None:
        """Compile nothing: `LocateImage` finds the images itself."""


class ReadAhead(EpochIterator):  # type: ignore[misc]
    """FFCV's reading thread over given batches; yields the rows of `LocateImage` of each.

    An error in the thread is raised where its batch is due (FFCV: the consumer waits for ever), and
    `close` ends the thread (FFCV: it lives on with its buffers).
    """

    def __init__(self, loader: Loader, batches: Sequence[np.ndarray]) -> None:
        # Before the base class, which starts the thread.
        self.error: BaseException | None = None
        super().__init__(loader, np.concatenate(batches).astype(np.uint64))

    def run(self) -> None:
        """Read batch after batch until told to stop; None in the queue is the end."""
        try:
            for number, ids in enumerate(self.iter_ixes):
                if self.terminate_event.is_set():
                    return
                slot = number % (self.loader.batches_ahead + 2)
                (places,) = self.run_pipeline(number, ids, slot, None)
                # A copy, as FFCV uses its few buffers again.
                self.output_queue.put(places.copy())
        except BaseException as error:
            # Handed to the consumer, who raises it.
            self.error = error
        self.output_queue.put(None)

    def __next__(self) -> np.ndarray:
        places: np.ndarray | None = self.output_queue.get()
        if places is None:
            # Put back, so that the next call ends too instead of waiting.
            self.output_queue.put(None)
            raise self.error or StopIteration
        return places

    def close(self) -> None:
        """End the thread and wait for it; a consumer that still asks gets an error."""
        self.terminate_event.set()
        self.error = self.error or RuntimeError("the loader was closed")
        # The thread may wait to put a batch into the full queue, so the queue is emptied until it
        # ends.
        while self.is_alive():
            with suppress(Empty):
                self.output_queue.get(timeout=0.01)
        with suppress(Empty):
            self.output_queue.get_nowait()
        self.output_queue.put(None)

    def __del__(self) -> None:
        """Do nothing: FFCV closes here, in whatever thread collects the garbage, even its own."""
