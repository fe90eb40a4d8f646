"""Batches made from lists of keys, by processes or here; a bad file is an error where its batch is due."""

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
    """What `make` makes of a key, or its error, whose message DataLoader would turn into a traceback."""

    def __init__(self, make: LoadItem) -> None:
        self.make = make

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.make(key)
        except (DecodeError, SourceError, OSError) as error:
            return error


def iter_batches(
    make: LoadItem, keys: Iterable[Sequence[Any]], collate: Callable[[list[Any]], Any], workers: int
) -> Generator[Any]:
    """`collate` of what `make` makes of each list of keys, by `workers` processes, or by this one with 0.

    Raises what the first bad key of a list raised, in the list's turn.
    """

    def first_error(items: list[Any]) -> Any:
        return next((item for item in items if isinstance(item, Exception)), None) or collate(items)

    loader = DataLoader(
        MapDataset(make),
        batch_sampler=keys,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=first_error,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if workers else None,
    )
    for item in loader:
        if isinstance(item, Exception):
            raise item
        yield item


def stack_samples(items: list[tuple[Tensor, Tensor | int, int]]) -> LabeledBatch:
    """Images, labels and sample ids of a batch."""
    return LabeledBatch(*default_collate(items))
