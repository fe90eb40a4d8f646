"""Make the loader of pretraining's views by its name."""

import torch

from mugs.data.loading.config import LoaderName, RendererName
from mugs.data.loading.drawing import TrainingViews
from mugs.data.loading.order import SampleOrder
from mugs.data.loading.view_loader import ViewLoader
from mugs.data.sources.base import Source
from mugs.data.views.annotate import Annotate, annotate_nothing
from mugs.data.views.config import ViewRecipe


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
    annotate: Annotate = annotate_nothing,
) -> ViewLoader:
    """Return a loader of views; its batches are the same whatever is chosen.

    Args:
        source: the images.
        recipe: what views are drawn from.
        order: which samples are in which batch.
        seed: seed of the views.
        loader: "auto" and "thread" read folders and `.beton` files. "ffcv" lets FFCV read the
            `.beton` file; below about 1,000 images per second and process, where decoding and
            rendering are the cost, it is not faster.
        renderer: "fast" is compiled, "reference" is PIL's.
        threads: worker processes, each with one thread, that decode and render.
        ahead: batches that are prefetched at most.
        annotate: what is drawn of each image besides its views; it is sent to the workers.

    Raises:
        ValueError: FFCV is not installed.
        SourceError: FFCV cannot read the source.
    """
    torch_threads = torch.get_num_threads()
    try:
        loader_class = _import_ffcv_loader() if loader == "ffcv" else ViewLoader
        drawing = TrainingViews(recipe, seed, renderer, annotate)
        return loader_class(source, order, drawing, workers=threads, ahead=ahead)
    finally:
        # FFCV sets the threads of the whole process to 1, when it is imported and when its loader
        # is made.
        if loader == "ffcv":
            torch.set_num_threads(torch_threads)


def _import_ffcv_loader() -> type[ViewLoader]:
    try:
        from mugs.data.loading.ffcv_loader import FFCVLoader
    except (ImportError, OSError) as error:
        raise ValueError(
            f"loader 'ffcv': {error}; install the extra 'ffcv' (README), or use loader: thread"
        ) from error
    return FFCVLoader
