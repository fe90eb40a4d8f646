"""Figure 2 of the paper with our results: linear probing by model size and by epochs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from results import resources
from results.cells import Cell
from results.figures.style import MARKERS, Drawing, Theme
from results.schema import Result
from results.spec import load_table_spec
from results.tables import build_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The methods of the legend in this order, the others after them by name.
ORDER = ("Mugs", "iBOT", "DINO")
MILLION_PARAMS = {"ViT-S/16": 21, "ViT-B/16": 85, "ViT-L/16": 307}


def draw_figure2(results: Sequence[Result]) -> Drawing:
    """Return the figure: printed insets, digitized markers of other methods, and our results."""
    table = build_table("figure2", results)
    by_size: list[tuple[float, Cell]] = []
    by_epochs: list[tuple[float, Cell]] = []
    for ours in table.our_cells():
        entry = ours.entry
        # Of several rows of ours the first one is the main experiment; only that one is drawn.
        if entry.method != "Mugs" or ours.ours is not entry.ours[0]:
            continue
        if entry.group.startswith("By model size"):
            by_size.append((MILLION_PARAMS[entry.arch], ours.cell))
        elif entry.group.startswith("By epochs"):
            by_epochs.append((int(entry.epochs), ours.cell))

    # Drawn once per theme; the numbers above are the same for both.
    def draw(theme: Theme) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _printed(left, theme, "a", "params_m")
        _printed(right, theme, "b", "epochs")
        _ours(left, theme, by_size)
        _ours(right, theme, by_epochs)
        _axes(left, "Parameters (millions)", (21, 85, 307), "By model size")
        _axes(right, "Pretraining epochs", (100, 300, 800), "ViT-S/16, by epochs")
        left.set_ylabel("Linear probing, top-1 (%)")
        figure.legend(*_entries(left, right), loc="outside right center")
        return figure

    caption = (
        "Linear probing on ImageNet-1K. Mugs and iBOT as printed in the insets; the other methods "
        "are read off the plotted markers (± 0.1). Ours with its standard deviation over seeds, "
        "where there are runs."
    )
    return Drawing("figure2", "Figure 2: accuracy by model size and by epochs", caption, draw)


def _printed(axes: Axes, theme: Theme, panel: str, x: str) -> None:
    """Draw the paper's points, a line per method."""
    points: dict[str, dict[float, float]] = defaultdict(dict)
    for marker in resources.read_csv("paper", "figure2_markers.csv"):
        if marker["panel"] == panel and marker[x] and marker["arch"] != "resnet50":
            points[marker["method"]][float(marker[x])] = float(marker["value"])
    # The numbers printed in the insets replace those read off the markers.
    for row in load_table_spec("figure2").paper:
        if row.group.startswith("By model size") == (panel == "a"):
            position = float(row.params_m if panel == "a" else row.epochs)
            points[row.method][position] = row.values["linear"]

    others = sorted(points.keys() - set(ORDER))
    for method in (*ORDER, *others):
        xs, ys = zip(*sorted(points[method].items()), strict=True)
        axes.plot(
            xs,
            ys,
            label=f"{method} (paper)",
            linewidth=2.0 if method == "Mugs" else 1.2,
            color=theme.color(method),
            marker=MARKERS.get(method, "o"),
            markersize=5,
        )


def _ours(axes: Axes, theme: Theme, points: Sequence[tuple[float, Cell]]) -> None:
    if points:
        xs, cells = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        axes.errorbar(
            xs,
            [cell.value for cell in cells],
            yerr=[cell.spread or 0.0 for cell in cells],
            label="Mugs (ours)",
            fmt="*",
            markersize=11,
            capsize=3,
            color=theme.ours,
            zorder=5,
        )


def _axes(axes: Axes, label: str, ticks: Sequence[int], title: str) -> None:
    # Sizes and lengths grow by factors; the ticks are the values that were trained.
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_title(title, loc="left")


def _entries(*panels: Axes) -> tuple[list[Any], list[str]]:
    """Return handles and labels of the legend of several panels, each label once, ours first."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = sorted(found, key=lambda label: label != "Mugs (ours)")
    return [found[label] for label in labels], labels
