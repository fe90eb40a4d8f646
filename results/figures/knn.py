"""k-NN accuracy over epochs: of pretrainings of different length, and in the course of one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from results.cells import Cell
from results.figures.style import Drawing, Theme
from results.schema import Result
from results.spec import load_table_spec
from results.tables import OurCell, build_table
from results.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LENGTHS = (
    "Best k and temperature of each pretraining. 0 epochs is the network at initialisation; vertical bars are the "
    "standard deviation over seeds."
)
DASHED = " Dashed: the paper's ViT-S/16 (100, 300 and 800 epochs)."
STAGE = "knn_curve"
EPOCH = re.compile(r"epoch=(\d+), (.+)")
COURSE = (
    "The teacher at the start of a pretraining, at checkpoints on the way, and at its end; k and temperature are those "
    "with the best last value."
)
INITIAL = " (initialisation)"


def draw_knn_over_epochs(results: Sequence[Result]) -> Drawing | None:
    """k-NN accuracy against the length of pretrainings that are otherwise the same; None with fewer than two points."""
    series: dict[str, dict[int, Cell]] = defaultdict(dict)
    for own in build_table("table1", results).our_cells():
        if own.key == "knn":
            row = own.cell.results[0].row
            series[_pretraining(own)][0 if row.method.endswith(INITIAL) else row.epochs] = own.cell
    if not any(len(found) > 1 for found in series.values()):
        return None
    title, caption = (
        "k-NN over pretraining epochs",
        LENGTHS + (DASHED if _has_small(series) else ""),
    )
    return Drawing("knn_over_epochs", title, caption, lambda theme: _draw_lengths(series, theme))


def _pretraining(own: OurCell) -> str:
    """What a pretraining has in common with longer and shorter ones."""
    result, known = own.cell.results[0], load_vocabulary()
    method = known.method_title(result.row.method.removesuffix(INITIAL))
    where = f"{own.entry.arch} on {known.dataset_title(result.row.dataset)}"
    return " ".join(
        filter(None, (method, result.variant, where, own.ours.label.removeprefix("ours").strip()))
    )


def _has_small(series: Mapping[str, object]) -> bool:
    return any("ViT-S/16" in name for name in series)


def _draw_lengths(series: dict[str, dict[int, Cell]], theme: Theme) -> Figure:
    figure, axes = _axes("Pretraining epochs")
    for number, (name, found) in enumerate(sorted(series.items())):
        xs = sorted(found)
        errors = [found[x].spread or 0.0 for x in xs]
        color = theme.one_of(number)
        axes.errorbar(
            xs,
            [found[x].value for x in xs],
            yerr=errors,
            marker="o",
            capsize=3,
            color=color,
            label=name,
        )
    if _has_small(series):
        lines = [
            line
            for line in load_table_spec("table1").paper
            if line.method == "Mugs" and line.arch == "vit_s16"
        ]
        points = sorted((line.pretrain_epochs or 0, line.values["knn"]) for line in lines)
        axes.plot(
            *zip(*points, strict=True),
            "--",
            color=theme.color("Mugs"),
            label="Mugs ViT-S/16, paper",
        )
    axes.legend()
    return figure


def _axes(label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(label)
    axes.set_ylabel("k-NN, top-1 (%)")
    return figure, axes


def draw_knn_during_pretraining(results: Sequence[Result]) -> Drawing | None:
    """A line per run of the stage `knn_curve`; None without any."""
    curves = [best_setting_curve(found) for found in _by_run(results).values()]
    if not curves:
        return None
    return Drawing(
        STAGE, "k-NN during pretraining", COURSE, lambda theme: _draw_course(curves, theme)
    )


def _by_run(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.row.stage == STAGE and EPOCH.fullmatch(result.row.setting):
            found[result.row.run_id].append(result)
    return dict(sorted(found.items()))


def best_setting_curve(results: Sequence[Result]) -> tuple[str, dict[int, float]]:
    """Label and accuracy by epoch, of the setting that ends best."""
    by_setting: dict[str, dict[int, float]] = defaultdict(dict)
    for result in results:
        matched = EPOCH.fullmatch(result.row.setting)
        assert matched is not None
        by_setting[matched[2]][int(matched[1])] = result.row.value
    setting = max(sorted(by_setting), key=lambda name: by_setting[name][max(by_setting[name])])
    row, known = results[0].row, load_vocabulary()
    variant = f" {results[0].variant}" if results[0].variant else ""
    where = f"{known.arch_title(row.arch)}{variant}, {known.dataset_title(row.dataset)}"
    return f"{where}, {setting}, seed {row.seed}", dict(sorted(by_setting[setting].items()))


def _draw_course(curves: Sequence[tuple[str, dict[int, float]]], theme: Theme) -> Figure:
    figure, axes = _axes("Epoch of the pretraining")
    for number, (label, points) in enumerate(curves):
        color = theme.one_of(number)
        axes.plot(
            list(points), list(points.values()), marker="o", markersize=4, color=color, label=label
        )
    axes.legend()
    return figure
