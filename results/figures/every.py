"""All figures that the results and runs of a run root have material for."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from results.collect import Collection
from results.figures.accuracy import figure2, knn_over_epochs
from results.figures.curves import training_curves
from results.figures.knn_curve import knn_during_pretraining
from results.figures.style import Drawing
from results.figures.tsne import tsne
from results.runs import in_order


def drawings(collection: Collection, root: Path, classes: Sequence[int] = ()) -> list[Drawing]:
    """Figure 2, k-NN over epochs and during pretraining, training curves, t-SNE of stored features of `classes`."""
    return list(_drawings(collection, root, classes))


def _drawings(collection: Collection, root: Path, classes: Sequence[int]) -> Iterator[Drawing]:
    yield figure2(collection.results)
    if (knn := knn_over_epochs(collection.results)) is not None:
        yield knn
    if (during := knn_during_pretraining(collection.results)) is not None:
        yield during
    for run in in_order(list(collection.runs.values())):
        found = None
        if run.stage == "pretrain":
            found = training_curves(run, root)
        elif run.stage == "features":
            found = tsne(run, root, collection.runs.get(run.upstream.get("data", "")), classes)
        if found is not None:
            yield found
