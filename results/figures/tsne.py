"""t-SNE of stored features: the class tokens of validation images of some classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.figures.style import Drawing, Theme
from results.runs import FinishedRun
from results.spec import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERPLEXITY = 30  # scikit-learn's default
SEED = 0
MAX_POINTS = 1200
FIRST_CLASSES = 6  # the paper's Figure 4 shows six classes


@dataclass(frozen=True)
class ChosenFeatures:
    """Features (N, D) and class indices (N,) of the images to show; class names by index."""

    features: Any
    labels: Any
    names: dict[int, str]


def draw_tsne(
    run: FinishedRun, root: Path, data: FinishedRun | None, classes: Sequence[int] = ()
) -> Drawing | None:
    """Return the figure of a run of the stage `features`; None if it stored no validation features.

    By default it shows all classes if there are at most ten, else the first six. `data` is the run
    that converted the data set; it has the class names.

    Raises:
        OptionError: the data set has no such class.
    """
    folder = root / run.outputs.get("features", "no features") / "val"
    if not folder.is_dir():
        return None
    chosen = choose_features(folder, _names(root, data), classes)
    shown = ", ".join(chosen.names.values())
    weights = run.info.get("weights") or run.config.get("weights", "weights")
    caption = (
        f"Class tokens after the final norm, L2-normalised, of {len(chosen.labels)} validation "
        f"images; {weights} of run {run.upstream.get('weights', run.run_id)}. Classes: {shown}. "
        f"scikit-learn, perplexity {PERPLEXITY}, seed {SEED}."
    )
    # Embedded once, not once for each theme.
    points = embed_features(chosen.features)
    return Drawing(
        f"tsne_{run.run_id}",
        f"t-SNE of {run.name} ({run.run_id})",
        caption,
        lambda theme: _draw(points, chosen, theme),
    )


def _names(root: Path, data: FinishedRun | None) -> list[str]:
    """Return the class names of the converted data set; empty if there is no record of it."""
    if data is None or "val_sidecar" not in data.outputs:
        return []
    sidecar = json.loads((root / data.outputs["val_sidecar"]).read_text(encoding="utf-8"))
    return [str(name) for name in sidecar["classes"]]


def choose_features(
    folder: Path, names: Sequence[str], classes: Sequence[int] = ()
) -> ChosenFeatures:
    """Return images of the chosen classes, at most `MAX_POINTS`, taken at equal distances."""
    import numpy as np
    from safetensors import safe_open

    features_of = []
    labels_of = []
    for path in sorted(folder.glob("shard_*.safetensors")):
        with safe_open(path, framework="numpy") as shard:
            labels_of.append(shard.get_tensor("labels"))
            features_of.append(shard.get_slice("cls")[:, -1])  # of the last block only
    labels = np.concatenate(labels_of)
    features = np.concatenate(features_of).astype(np.float32)
    known = sorted({int(label) for label in labels})
    wanted = list(classes) or (known if len(known) <= 10 else known[:FIRST_CLASSES])
    if missing := sorted(set(wanted) - set(known)):
        raise OptionError(
            f"--classes: {folder} has no class {missing[0]} (classes: {known[0]} to {known[-1]})"
        )
    where = np.flatnonzero(np.isin(labels, wanted))
    # Every n-th image and not the first ones, which may be of few classes.
    where = where[:: -(-len(where) // MAX_POINTS)]
    found = features[where]
    # L2-normalized, as k-NN compares them; 1e-12 as torch.nn.functional.normalize has it.
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    shown = {index: names[index] if index < len(names) else str(index) for index in wanted}
    return ChosenFeatures(found, labels[where], shown)


def _draw(points: Any, chosen: ChosenFeatures, theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for position, (index, name) in enumerate(chosen.names.items()):
        mine = points[chosen.labels == index]
        axes.scatter(
            mine[:, 0],
            mine[:, 1],
            s=9,
            color=theme.one_of(position),
            # With more classes than colors, the next round of colors has another marker.
            marker="os^DvP"[position // len(theme.series) % 6],
            label=name,
        )
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside right center", title="Class", markerscale=1.6)
    return figure


def embed_features(features: Any) -> Any:
    """Return points (N, 2) for features (N, D); the same each time."""
    from sklearn.manifold import TSNE

    # scikit-learn refuses a perplexity of N or more; a third of N still has neighbors to compare.
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    model: Any = TSNE  # has no annotations
    return model(
        perplexity=perplexity, random_state=SEED, init="pca", learning_rate="auto"
    ).fit_transform(features)
