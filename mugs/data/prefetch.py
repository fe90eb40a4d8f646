"""Prefetch results with a pool of threads, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
ProgressCallback = Callable[[int, int], None]
"""Is called with how many items are done and how many there are."""


def ignore_progress(done: int, total: int) -> None:
    """Do nothing: the default where a caller may ask for progress."""


def map_prefetched(function: Callable[[S], T], items: Iterable[S], threads: int) -> Iterator[T]:
    """Yield the result for each item, in order, computed ahead by a pool of threads.

    Raises what the function raised, when the item's turn comes.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[T]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            # Four items per thread keep all threads busy while one item takes longer, and bound the
            # memory: `Executor.map` would take all items at once.
            if len(pending) >= 4 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def map_in_chunks(
    function: Callable[[S], T], items: Sequence[S], threads: int, chunk: int = 256
) -> Iterator[T]:
    """Yield the result for each item, in order; a thread computes `chunk` of them in one go.

    For functions of microseconds: handing one item to a thread takes 40 of them.
    """
    chunks = [items[start : start + chunk] for start in range(0, len(items), chunk)]
    for results in map_prefetched(lambda part: list(map(function, part)), chunks, threads):
        yield from results


def with_progress(items: Iterator[T], total: int, report: ProgressCallback) -> Iterator[T]:
    """Pass items through and report after each how many there were."""
    for done, item in enumerate(items, 1):
        yield item
        report(done, total)
