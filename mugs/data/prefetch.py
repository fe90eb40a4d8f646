"""Results of a pool of threads, in order and a few ahead of who takes them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
ProgressCallback = Callable[[int, int], None]
"""Is told how many are done, of how many."""


def map_prefetched(function: Callable[[S], T], items: Iterable[S], threads: int) -> Iterator[T]:
    """Results in order, computed by a pool that runs at most a few items ahead."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[T]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 4 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def with_progress(items: Iterator[T], total: int, report: ProgressCallback) -> Iterator[T]:
    """Pass items through and report how many there were."""
    for done, item in enumerate(items, 1):
        yield item
        report(done, total)
