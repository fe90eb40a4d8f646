"""Batches of views in the exact order of `Order`, whichever front end makes them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from mugs.data.order import Order
from mugs.data.recipe import ViewRecipe
from mugs.data.source import Source

if TYPE_CHECKING:
    from mugs.data.ffcv_loader import FFCVLoader

LoaderName = Literal["auto", "thread", "ffcv"]
RendererName = Literal["fast", "reference"]


@dataclass(frozen=True)
class Batch:
    """Views of N images of one rank, crop-major, as bytes.

    large (4, N, 3, S, S): teacher 0, teacher 1, student 0, student 1; small (P, N, 3, s, s); erase (4 + P, N, 4) boxes
    x, y, w, h with w = 0 for none; weak (N,): the large student crops are weak; ids and labels (N,).
    """

    large: Tensor
    small: Tensor
    erase: Tensor
    weak: Tensor
    ids: Tensor
    labels: Tensor
    epoch: int
    step: int


class ViewLoader(Protocol):
    """A front end: any of them gives the same batches."""

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """This rank's batches of global steps start ... stop - 1."""

    def close(self) -> None:
        """Stop all threads."""


def make_loader(
    source: Source,
    recipe: ViewRecipe,
    order: Order,
    *,
    seed: int,
    loader: LoaderName = "auto",
    renderer: RendererName = "fast",
    threads: int = 2,
    ahead: int = 3,
) -> ViewLoader:
    """The front end by name; `threads` render, at most `ahead` batches ahead.

    "auto" is the thread loader, which reads folders and `.beton` files alike. "ffcv" lets FFCV read the `.beton` file;
    below some 1,000 images per second and process, where decoding and rendering are the cost, it is no faster.
    Renderers are "fast", compiled, and "reference", PIL's. The batches are the same whatever is chosen. Raises
    ValueError where FFCV is not installed, SourceError where it cannot read the source.
    """
    if loader != "ffcv":
        from mugs.data.thread_loader import ThreadLoader

        return ThreadLoader(
            source, recipe, order, seed=seed, renderer=renderer, threads=threads, ahead=ahead
        )
    torch_threads = torch.get_num_threads()
    try:
        front_end = _ffcv_loader()
        return front_end(
            source, recipe, order, seed=seed, renderer=renderer, threads=threads, ahead=ahead
        )
    finally:
        torch.set_num_threads(torch_threads)  # FFCV sets it to 1, at import already


def _ffcv_loader() -> "type[FFCVLoader]":
    try:
        from mugs.data.ffcv_loader import FFCVLoader
    except (ImportError, OSError) as error:
        raise ValueError(
            f"loader 'ffcv': {error}; install the extra 'ffcv' (README), or use loader: thread"
        ) from error
    return FFCVLoader
