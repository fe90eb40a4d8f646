"""t-SNE of stored features of validation images of some classes, alone and of methods side by side.

The features are class tokens, or mean patch tokens of a method that does not train the class token.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.files import open_regular_file, read_bounded
from results.figures.style import Drawing, Theme
from results.runs import FinishedRun
from results.spec import OptionError
from results.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
TOKENS = {"cls": "Class tokens", "patch_mean": "Mean patch tokens"}
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


@dataclass(frozen=True)
class Panel:
    """One embedding: points (N, 2) of chosen features; an empty title is not shown."""

    title: str
    points: Any
    chosen: ChosenFeatures


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
    chosen = choose_features(folder, _names(root, data), classes, _feature_of(run))
    shown = ", ".join(chosen.names.values())
    weights = run.info.get("weights") or run.config.get("weights", "weights")
    caption = (
        f"{TOKENS[_feature_of(run)]} after the final norm, L2-normalised, of {len(chosen.labels)} "
        f"validation images; {weights} of run {run.upstream.get('weights', run.run_id)}. "
        f"Classes: {shown}. scikit-learn, perplexity {PERPLEXITY}, seed {SEED}."
    )
    # Embedded once, not once for each theme.
    points = embed_features(chosen.features)
    return Drawing(
        f"tsne_{run.run_id}",
        f"t-SNE of {run.name} ({run.run_id})",
        caption,
        lambda theme: _draw([Panel("", points, chosen)], theme),
    )


def draw_methods(
    runs: Sequence[FinishedRun], root: Path, data: FinishedRun | None, classes: Sequence[int] = ()
) -> Drawing | None:
    """Return t-SNE of several methods side by side, as Figures 4 and 5 of the paper.

    `runs` are those of the stage `features` on one data set, of backbones of one size. Of each
    method the longest pretraining is shown, of equally long ones the first. None if fewer than two
    methods have stored validation features.

    Raises:
        OptionError: the data set has no such class.
    """
    longest: dict[str, FinishedRun] = {}
    for run in runs:
        stored = (root / run.outputs.get("features", "no features") / "val").is_dir()
        if not stored or run.info.get("method") is None or run.info.get("epochs") is None:
            continue
        method = str(run.info["method"])
        if method not in longest or run.info["epochs"] > longest[method].info["epochs"]:
            longest[method] = run
    if len(longest) < 2:
        return None
    panels = []
    for method, run in longest.items():
        folder = root / run.outputs["features"] / "val"
        chosen = choose_features(folder, _names(root, data), classes, _feature_of(run))
        title = f"{load_vocabulary().method_title(method)}, {run.info['epochs']} epochs"
        panels.append(Panel(title, embed_features(chosen.features), chosen))
    shown = ", ".join(panels[0].chosen.names.values())
    tokens = ", ".join(
        f"{method}: {TOKENS[_feature_of(run)].lower()} of run {run.run_id}"
        for method, run in longest.items()
    )
    size = size_of(runs[0])
    caption = (
        f"As Figures 4 and 5 of the paper. Each method is embedded on its own; {tokens}. All after "
        f"the final norm, L2-normalised, of {len(panels[0].chosen.labels)} validation images. "
        f"Classes: {shown}. scikit-learn, perplexity {PERPLEXITY}, seed {SEED}."
    )
    data_id = runs[0].upstream.get("data", "data")
    return Drawing(
        f"tsne_methods_{size}_{data_id}",
        f"t-SNE of {len(panels)} methods, {size}",
        caption,
        lambda theme: _draw(panels, theme),
    )


def size_of(run: FinishedRun) -> str:
    """Return the size of a backbone without its variants: "vit_b16" of "vit_b16_sincos"."""
    return "_".join(str(run.info.get("arch", "")).split("_")[:2])


def _feature_of(run: FinishedRun) -> str:
    # Features that were stored before there was a choice are those of methods with class tokens.
    return str(run.info.get("trained_feature", "cls"))


def _names(root: Path, data: FinishedRun | None) -> list[str]:
    """Return the class names of the converted data set; empty if there is no record of it."""
    if data is None or "val_sidecar" not in data.outputs:
        return []
    path = root / data.outputs["val_sidecar"]
    try:
        return [str(name) for name in json.loads(read_bounded(path))["classes"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        logger.warning("unreadable: %s: %r; classes have numbers instead of names", path, error)
        return []


def choose_features(
    folder: Path, names: Sequence[str], classes: Sequence[int] = (), feature: str = "cls"
) -> ChosenFeatures:
    """Return images of the chosen classes, at most `MAX_POINTS`, taken at equal distances."""
    import numpy as np

    shards = [read_shard(path, feature) for path in sorted(folder.glob("shard_*.safetensors"))]
    if not shards:
        raise FeaturesError(f"unreadable: {folder}: it has no features")
    features = np.concatenate([stored for stored, _ in shards]).astype(np.float32)
    labels = np.concatenate([found for _, found in shards])
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
    if min(found.shape) < 2:
        raise FeaturesError(f"unreadable: {folder}: features of shape {found.shape}")
    # L2-normalized, as k-NN compares them; 1e-12 as torch.nn.functional.normalize has it.
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    shown = {index: names[index] if index < len(names) else str(index) for index in wanted}
    return ChosenFeatures(found, labels[where], shown)


def read_shard(path: Path, feature: str) -> tuple[Any, Any]:
    """Return features (N, D) and labels (N,) of a file of stored features.

    Raises:
        FeaturesError: it cannot be read, or holds something else.
    """
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        os.close(open_regular_file(path))  # the library would wait for a pipe
        with safe_open(path, framework="numpy") as shard:
            labels = shard.get_tensor("labels")
            stored = shard.get_slice(feature)
            # Class tokens of several blocks are stored; only those of the last are shown.
            features = stored[:, -1] if feature == "cls" else stored[:]
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise FeaturesError(f"unreadable: {path}: {error}") from None
    fits = features.ndim == 2 and labels.shape == features.shape[:1] and labels.dtype.kind in "iu"
    if not fits or not np.isfinite(features).all():
        raise FeaturesError(f"unreadable: {path}: expected finite features and a label for each")
    return features, labels


class FeaturesError(ValueError):
    """Stored features cannot be read; the message names the file."""


def _draw(panels: Sequence[Panel], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.4 + 4.2 * columns, 0.4 + 4.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    for panel, axes in zip(panels, grid.flat, strict=False):
        axes.set_title(panel.title)
        _scatter(axes, panel, theme)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", title="Class", markerscale=1.6)
    return figure


def _scatter(axes: Axes, panel: Panel, theme: Theme) -> None:
    for position, (index, name) in enumerate(panel.chosen.names.items()):
        mine = panel.points[panel.chosen.labels == index]
        axes.scatter(
            mine[:, 0],
            mine[:, 1],
            s=9,
            color=theme.one_of(position),
            # With more classes than colors, the next round of colors has another marker.
            marker="os^DvP"[position // len(theme.series) % 6],
            label=name,
        )


def embed_features(features: Any) -> Any:
    """Return points (N, 2) for features (N, D); the same each time."""
    from sklearn.manifold import TSNE

    # scikit-learn refuses a perplexity of N or more; a third of N still has neighbors to compare.
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    model: Any = TSNE  # has no annotations
    return model(
        perplexity=perplexity, random_state=SEED, init="pca", learning_rate="auto"
    ).fit_transform(features)
