"""All figures for which the results and runs of a run root have material."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from results.collect import CollectedResults
from results.figures.curves import draw_training_curves
from results.figures.figure2 import draw_figure2
from results.figures.knn import draw_knn_during_pretraining, draw_knn_over_epochs
from results.figures.style import Drawing
from results.figures.tsne import FeaturesError, draw_methods, draw_tsne, size_of
from results.runs import FinishedRun, sort_by_dependency

logger = logging.getLogger(__name__)


def draw_all_figures(
    collection: CollectedResults, root: Path, classes: Sequence[int] = ()
) -> list[Drawing]:
    """Return Figure 2, the k-NN figures, training curves, and t-SNE of stored features.

    `classes` are the classes that t-SNE shows, by number.
    """
    figures: list[Drawing | None] = [
        draw_figure2(collection.results),
        draw_knn_over_epochs(collection.results),
        draw_knn_during_pretraining(collection.results),
    ]
    runs = sort_by_dependency(list(collection.runs.values()))
    for run in runs:
        if run.stage == "pretrain":
            figures.append(draw_training_curves(run, root))
        elif run.stage == "features":
            data = collection.runs.get(run.upstream.get("data", ""))
            figures.append(_draw_features(partial(draw_tsne, run, root, data, classes)))
    comparable: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in runs:
        # Features of networks before pretraining would stand for their method.
        if run.stage == "features" and run.info.get("weights", "teacher") == "teacher":
            comparable.setdefault((run.upstream.get("data", ""), size_of(run)), []).append(run)
    for (data_id, _), same in comparable.items():
        data = collection.runs.get(data_id)
        figures.append(_draw_features(partial(draw_methods, same, root, data, classes)))
    return [figure for figure in figures if figure is not None]


def _draw_features(draw: Callable[[], Drawing | None]) -> Drawing | None:
    """Return a figure of stored features; log and leave it out if they cannot be read."""
    try:
        return draw()
    except FeaturesError as error:
        logger.warning("%s; its figure is left out", error)
        return None
