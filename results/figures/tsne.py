"""t-SNE of stored features (scikit-learn's): the class tokens of validation images of some classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.figures.style import Drawing, Theme
from results.options import OptionError
from results.runs import FinishedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERPLEXITY = 30
SEED = 0
MOST = 1200
FIRST = 6


@dataclass(frozen=True)
class ChosenFeatures:
    """Features (N, D) and class indices (N,) of the images to show, and the names of the classes."""

    features: Any
    labels: Any
    names: dict[int, str]


def draw_tsne(
    run: FinishedRun, root: Path, data: FinishedRun | None, classes: Sequence[int] = ()
) -> Drawing | None:
    """The drawing of a run of the stage `features`; None where it has none.

    Default: all classes where there are at most ten, else the first six, as in the paper's Figure 4. Raises
    OptionError for a class the data set has not.
    """
    folder = root / run.outputs["features"] / "val" if "features" in run.outputs else None
    if folder is None or not folder.is_dir():
        return None
    chosen = choose_features(folder, _names(root, data), classes)
    shown = ", ".join(chosen.names.values())
    weights = run.info.get("weights") or run.config.get("weights", "weights")
    caption = (
        f"Class tokens after the final norm, L2-normalised, of {len(chosen.labels)} validation images; {weights} "
        f"of run {run.upstream.get('weights', run.run_id)}. Classes: {shown}. "
        f"scikit-learn, perplexity {PERPLEXITY}, seed {SEED}."
    )
    points, title = embed_features(chosen.features), f"t-SNE of {run.name} ({run.run_id})"
    return Drawing(f"tsne_{run.run_id}", title, caption, lambda theme: _draw(points, chosen, theme))


def _names(root: Path, data: FinishedRun | None) -> list[str]:
    """Class names of the converted data set."""
    if data is None or "val_sidecar" not in data.outputs:
        return []
    sidecar = json.loads((root / data.outputs["val_sidecar"]).read_text(encoding="utf-8"))
    return [str(name) for name in sidecar["classes"]]


def choose_features(
    folder: Path, names: Sequence[str], classes: Sequence[int] = ()
) -> ChosenFeatures:
    """Images of the chosen classes, at most 1200, taken evenly."""
    import numpy as np
    from safetensors import safe_open

    features_of, labels_of = [], []
    for path in sorted(folder.glob("shard_*.safetensors")):
        with safe_open(path, framework="numpy") as shard:
            labels_of.append(shard.get_tensor("labels"))
            features_of.append(shard.get_slice("cls")[:, -1])  # of the last block only
    labels, features = np.concatenate(labels_of), np.concatenate(features_of).astype(np.float32)
    known = sorted({int(label) for label in labels})
    wanted = list(classes) or (known if len(known) <= 10 else known[:FIRST])
    if missing := sorted(set(wanted) - set(known)):
        raise OptionError(
            f"--classes: {folder} has no class {missing[0]} (classes: {known[0]} to {known[-1]})"
        )
    where = np.flatnonzero(np.isin(labels, wanted))
    where = where[:: -(-len(where) // MOST)]
    found = features[where]
    found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return ChosenFeatures(
        found,
        labels[where],
        {index: names[index] if index < len(names) else str(index) for index in wanted},
    )


def _draw(points: Any, chosen: ChosenFeatures, theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for position, (index, name) in enumerate(chosen.names.items()):
        mine = points[chosen.labels == index]
        marker = "os^DvP"[position // len(theme.series) % 6]
        axes.scatter(
            mine[:, 0], mine[:, 1], s=9, color=theme.one_of(position), marker=marker, label=name
        )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside right center", title="Class", markerscale=1.6)
    return figure


def embed_features(features: Any) -> Any:
    """Points (N, 2) of features (N, D); the same each time."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    model: Any = TSNE  # has no annotations
    return model(
        perplexity=perplexity, random_state=SEED, init="pca", learning_rate="auto"
    ).fit_transform(features)
