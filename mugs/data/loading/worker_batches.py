"""Make batches from lists of keys, in worker processes or in this one."""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mugs.data.sources.base import SourceError
from mugs.data.sources.decode import DecodeError

LoadItem = Callable[[Any], Any]


class LabeledBatch(NamedTuple):
    """Images (N, 3, S, S), labels (N,) or label maps (N, S, S), and sample ids (N,) of one rank."""

    images: Tensor
    labels: Tensor
    ids: Tensor


class MapDataset(Dataset[Any]):
    """Dataset of what `load_item` returns for a key, or of the error that a bad file raises."""

    def __init__(self, load_item: LoadItem) -> None:
        self.load_item = load_item

    def __getitem__(self, key: Any) -> Any:
        # The error is passed on as a value: raised in a worker, DataLoader would put its traceback
        # into the message.
        try:
            return self.load_item(key)
        except (DecodeError, SourceError, OSError) as error:
            return error


def iter_batches(
    load_item: LoadItem,
    keys: Iterable[Sequence[Any]],
    collate: Callable[[list[Any]], Any],
    workers: int,
) -> Generator[Any]:
    """Yield, for each list of keys, the collated items that `load_item` returns.

    With `workers` processes, or in this one for 0. Raises what the first bad key of a list raised,
    when the list's turn comes.
    """

    def first_error(items: list[Any]) -> Any:
        return next((item for item in items if isinstance(item, Exception)), None) or collate(items)

    loader = DataLoader(
        MapDataset(load_item),
        batch_sampler=keys,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=first_error,
        pin_memory=torch.cuda.is_available(),
        # Closures cannot be pickled, which other ways to start a process would need.
        multiprocessing_context="fork" if workers else None,
    )
    for item in loader:
        if isinstance(item, Exception):
            raise item
        yield item


def stack_samples(items: list[tuple[Tensor, Tensor | int, int]]) -> LabeledBatch:
    """Collate images, labels and sample ids."""
    return LabeledBatch(*default_collate(items))
