"""All figures for which the results and runs of a run root have material."""

from collections.abc import Sequence
from pathlib import Path

from results.collect import CollectedResults
from results.figures.curves import draw_training_curves
from results.figures.figure2 import draw_figure2
from results.figures.knn import draw_knn_during_pretraining, draw_knn_over_epochs
from results.figures.style import Drawing
from results.figures.tsne import draw_tsne
from results.runs import sort_by_dependency


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
    for run in sort_by_dependency(list(collection.runs.values())):
        if run.stage == "pretrain":
            figures.append(draw_training_curves(run, root))
        elif run.stage == "features":
            data = collection.runs.get(run.upstream.get("data", ""))
            figures.append(draw_tsne(run, root, data, classes))
    return [figure for figure in figures if figure is not None]
