"""k-NN accuracy in the course of pretrainings, from the rows of the stage `knn_curve`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from results.figures.style import Drawing, Theme
from results.schema import Result
from results.vocabulary import vocabulary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGE = "knn_curve"
EPOCH = re.compile(r"epoch=(\d+), (.+)")
CAPTION = (
    "The teacher at the start of a pretraining, at checkpoints on the way, and at its end; k and temperature are those "
    "with the best last value."
)


def knn_during_pretraining(results: Sequence[Result]) -> Drawing | None:
    """A line per run of the stage; None without any."""
    curves = {run_id: curve(found) for run_id, found in _by_run(results).items()}
    if not curves:
        return None
    return Drawing(STAGE, "k-NN during pretraining", CAPTION, lambda theme: _draw(curves, theme))


def _by_run(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.row.stage == STAGE and EPOCH.fullmatch(result.row.setting):
            found[result.row.run_id].append(result)
    return dict(sorted(found.items()))


def curve(results: Sequence[Result]) -> tuple[str, dict[int, float]]:
    """Label and accuracy by epoch, of the setting that ends best."""
    by_setting: dict[str, dict[int, float]] = defaultdict(dict)
    for result in results:
        matched = EPOCH.fullmatch(result.row.setting)
        assert matched is not None
        by_setting[matched[2]][int(matched[1])] = result.row.value
    setting = max(sorted(by_setting), key=lambda name: by_setting[name][max(by_setting[name])])
    row, known = results[0].row, vocabulary()
    variant = f" {results[0].variant}" if results[0].variant else ""
    where = f"{known.arch(row.arch)}{variant}, {known.dataset(row.dataset)}"
    return f"{where}, {setting}, seed {row.seed}", dict(sorted(by_setting[setting].items()))


def _draw(curves: dict[str, tuple[str, dict[int, float]]], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (label, points) in enumerate(curves.values()):
        color = (theme.ours, *theme.cycle)[number % (1 + len(theme.cycle))]
        axes.plot(list(points), list(points.values()), marker="o", markersize=4, color=color, label=label)
    axes.set_xlabel("Epoch of the pretraining")
    axes.set_ylabel("k-NN, top-1 (%)")
    axes.legend()
    return figure
