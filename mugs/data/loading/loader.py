"""Batches of views in the exact order of `SampleOrder`, whichever front end makes them."""

from typing import TYPE_CHECKING

import torch

from mugs.data.loading.batch import ViewLoader
from mugs.data.loading.config import LoaderName, RendererName
from mugs.data.loading.order import SampleOrder
from mugs.data.sources.base import Source
from mugs.data.views.config import ViewRecipe

if TYPE_CHECKING:
    from mugs.data.loading.ffcv_loader import FFCVLoader


def make_loader(
    source: Source,
    recipe: ViewRecipe,
    order: SampleOrder,
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
        from mugs.data.loading.thread_loader import ThreadLoader

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
        from mugs.data.loading.ffcv_loader import FFCVLoader
    except (ImportError, OSError) as error:
        raise ValueError(
            f"loader 'ffcv': {error}; install the extra 'ffcv' (README), or use loader: thread"
        ) from error
    return FFCVLoader
