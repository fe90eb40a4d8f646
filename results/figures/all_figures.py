"""All figures that the results and runs of a run root have material for."""

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
    """Figure 2, k-NN over epochs and during pretraining, training curves, t-SNE of stored features of `classes`."""
    found = [
        draw(collection.results)
        for draw in (draw_figure2, draw_knn_over_epochs, draw_knn_during_pretraining)
    ]
    for run in sort_by_dependency(list(collection.runs.values())):
        if run.stage == "pretrain":
            found.append(draw_training_curves(run, root))
        elif run.stage == "features":
            found.append(
                draw_tsne(run, root, collection.runs.get(run.upstream.get("data", "")), classes)
            )
    return [drawing for drawing in found if drawing is not None]
