"""k-NN accuracy over epochs: of pretrainings of different length, and during one of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from results.cells import Cell
from results.figures.style import Drawing, Theme
from results.runs import group_by
from results.schema import Result
from results.spec import load_table_spec
from results.tables import OurCell, build_table
from results.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LENGTHS_CAPTION = (
    "Best k and temperature of each pretraining. 0 epochs is the network at initialisation; "
    "vertical bars are the standard deviation over seeds."
)
DASHED_CAPTION = " Dashed: the paper's ViT-S/16 (100, 300 and 800 epochs)."
STAGE = "knn_curve"
# The setting of a row of that stage: "epoch=12, cls, k=20, T=0.07".
EPOCH = re.compile(r"epoch=(\d+), (.+)")
DURING_CAPTION = (
    "The teacher at the start of a pretraining, at checkpoints on the way, and at its end; k and "
    "temperature are those with the best last value. Bands: mean over seeds ± standard deviation."
)
INITIAL = " (initialisation)"


def draw_knn_over_epochs(results: Sequence[Result]) -> Drawing | None:
    """Return k-NN accuracy over the length of otherwise equal pretrainings.

    None if no pretraining was run with two different lengths.
    """
    series: dict[str, dict[int, Cell]] = defaultdict(dict)
    for ours in build_table("table1", results).our_cells():
        if ours.key == "knn":
            row = ours.cell.results[0].row
            # The network at initialization is the pretraining of length 0.
            epochs = 0 if row.method.endswith(INITIAL) else row.epochs
            series[_series_name(ours)][epochs] = ours.cell
    # One point is no curve.
    if not any(len(found) > 1 for found in series.values()):
        return None
    return Drawing(
        name="knn_over_epochs",
        title="k-NN over pretraining epochs",
        caption=LENGTHS_CAPTION + (DASHED_CAPTION if _has_vit_s16(series) else ""),
        draw=lambda theme: _draw_lengths(series, theme),
    )


def _series_name(ours: OurCell) -> str:
    """Return what a pretraining has in common with longer and shorter ones."""
    result = ours.cell.results[0]
    vocabulary = load_vocabulary()
    method = vocabulary.method_title(result.row.method.removesuffix(INITIAL))
    where = f"{ours.entry.arch} on {vocabulary.dataset_title(result.row.dataset)}"
    label = ours.ours.label.removeprefix("ours").strip()
    return " ".join(filter(None, (method, result.variant, where, label)))


def _has_vit_s16(series: Mapping[str, object]) -> bool:
    return any("ViT-S/16" in name for name in series)


def _draw_lengths(series: dict[str, dict[int, Cell]], theme: Theme) -> Figure:
    figure, axes = _axes("Pretraining epochs")
    for number, (name, found) in enumerate(sorted(series.items())):
        xs = sorted(found)
        axes.errorbar(
            xs,
            [found[x].value for x in xs],
            # A single seed has no deviation; a bar of length 0 is not drawn.
            yerr=[found[x].spread or 0.0 for x in xs],
            marker="o",
            capsize=3,
            color=theme.one_of(number),
            label=name,
        )
    if _has_vit_s16(series):
        # Table 1 counts effective epochs; the axis has real ones.
        points = sorted(
            (row.pretrain_epochs or 0, row.values["knn"])
            for row in load_table_spec("table1").paper
            if row.method == "Mugs" and row.arch == "vit_s16"
        )
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


@dataclass(frozen=True)
class Curve:
    """Mean accuracy over seeds, and its standard deviation, by epoch."""

    label: str
    means: dict[int, float]
    # None for a single seed.
    spreads: dict[int, float | None]


def draw_knn_during_pretraining(results: Sequence[Result]) -> Drawing | None:
    """Return a curve per pretraining that the stage `knn_curve` watched; None without one.

    Pretrainings that differ in seed only are one curve.
    """
    found = [r for r in results if r.row.stage == STAGE and EPOCH.fullmatch(r.row.setting)]
    if not found:
        return None
    runs: dict[str, list[Result]] = group_by(found, attrgetter("row.run_id"))
    # Only where seeds were evaluated at the same epochs: else a mean would jump from one to the
    # next.
    alike = group_by((runs[run_id] for run_id in sorted(runs)), _describe_watched)
    curves = [make_curve([result for run in group for result in run]) for group in alike.values()]
    return Drawing(
        STAGE, "k-NN during pretraining", DURING_CAPTION, lambda theme: _draw_course(curves, theme)
    )


def _describe_watched(run: Sequence[Result]) -> tuple[object, ...]:
    """Return all that makes a watched pretraining, but for its seed."""
    row = run[0].row
    settings = frozenset(result.row.setting for result in run)
    about = (row.method, row.arch, row.epochs, row.dataset, run[0].variant, run[0].differs)
    return *about, settings


def make_curve(results: Sequence[Result]) -> Curve:
    """Return accuracy by epoch, for the setting with the best last value; a mean over seeds.

    The best setting at each epoch would mix several curves and look smoother than any of them.
    """
    by_setting: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        epoch, setting = EPOCH.findall(result.row.setting)[0]
        by_setting[setting][int(epoch)].append(result.row.value)
    last = {setting: fmean(found[max(found)]) for setting, found in by_setting.items()}
    best = max(sorted(last), key=lambda setting: last[setting])
    points = dict(sorted(by_setting[best].items()))

    row = results[0].row
    vocabulary = load_vocabulary()
    variant = f" {results[0].variant}" if results[0].variant else ""
    where = f"{vocabulary.arch_title(row.arch)}{variant}, {vocabulary.dataset_title(row.dataset)}"
    seeds = len({result.row.seed for result in results})
    repeated = f"{seeds} seeds" if seeds > 1 else f"seed {row.seed}"
    return Curve(
        label=f"{where}, {best}, {repeated}",
        means={epoch: fmean(values) for epoch, values in points.items()},
        spreads={
            epoch: stdev(values) if len(values) > 1 else None for epoch, values in points.items()
        },
    )


def _draw_course(curves: Sequence[Curve], theme: Theme) -> Figure:
    figure, axes = _axes("Epoch of the pretraining")
    for number, curve in enumerate(curves):
        xs = list(curve.means)
        means = list(curve.means.values())
        color = theme.one_of(number)
        axes.plot(xs, means, marker="o", markersize=4, color=color, label=curve.label)
        _draw_band(axes, xs, means, list(curve.spreads.values()), color)
    axes.legend()
    return figure


def _draw_band(
    axes: Axes,
    xs: Sequence[float],
    means: Sequence[float],
    spreads: Sequence[float | None],
    color: str,
) -> None:
    """Draw the standard deviation over seeds; a single seed has none."""
    if not any(spreads):
        return
    lower = [mean - (spread or 0.0) for mean, spread in zip(means, spreads, strict=True)]
    upper = [mean + (spread or 0.0) for mean, spread in zip(means, spreads, strict=True)]
    axes.fill_between(xs, lower, upper, color=color, alpha=0.25, linewidth=0)
