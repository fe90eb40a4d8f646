"""All figures that the results and runs of a run root have material for."""

from collections.abc import Sequence
from pathlib import Path

from results.collect import Collection
from results.figures.curves import training_curves
from results.figures.figure2 import figure2
from results.figures.knn import knn_during_pretraining, knn_over_epochs
from results.figures.style import Drawing
from results.figures.tsne import tsne
from results.runs import in_order


def drawings(collection: Collection, root: Path, classes: Sequence[int] = ()) -> list[Drawing]:
    """Figure 2, k-NN over epochs and during pretraining, training curves, t-SNE of stored features of `classes`."""
    found = [
        draw(collection.results) for draw in (figure2, knn_over_epochs, knn_during_pretraining)
    ]
    for run in in_order(list(collection.runs.values())):
        if run.stage == "pretrain":
            found.append(training_curves(run, root))
        elif run.stage == "features":
            found.append(
                tsne(run, root, collection.runs.get(run.upstream.get("data", "")), classes)
            )
    return [drawing for drawing in found if drawing is not None]
