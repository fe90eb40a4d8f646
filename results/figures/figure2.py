"""Figure 2 of the paper with ours over it: linear probing by model size and by epochs."""

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

ORDER = ("Mugs", "iBOT", "DINO")
PARAMS = {"ViT-S/16": 21, "ViT-B/16": 85, "ViT-L/16": 307}


def draw_figure2(results: Sequence[Result]) -> Drawing:
    """Linear probing by model size and by epochs: printed insets, digitised markers of other methods, ours."""
    table = build_table("figure2", results)
    ours = [
        own
        for own in table.our_cells()
        if own.entry.method == "Mugs" and own.ours is own.entry.ours[0]
    ]
    size = [
        (PARAMS[own.entry.arch], own.cell)
        for own in ours
        if own.entry.group.startswith("By model size")
    ]
    length = [
        (int(own.entry.epochs), own.cell) for own in ours if own.entry.group.startswith("By epochs")
    ]

    def draw(theme: Theme) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _printed(left, theme, "a", "params_m")
        _printed(right, theme, "b", "epochs")
        _ours(left, theme, size)
        _ours(right, theme, length)
        _axes(left, "Parameters (millions)", (21, 85, 307), "By model size")
        _axes(right, "Pretraining epochs", (100, 300, 800), "ViT-S/16, by epochs")
        left.set_ylabel("Linear probing, top-1 (%)")
        entries = _entries(left, right)
        figure.legend(list(entries.values()), list(entries), loc="outside right center")
        return figure

    caption = (
        "Linear probing on ImageNet-1K. Mugs and iBOT as printed in the insets; the other methods are read off the "
        "plotted markers (± 0.1). Ours with its standard deviation over seeds, where there are runs."
    )
    return Drawing("figure2", "Figure 2: accuracy by model size and by epochs", caption, draw)


def _printed(axes: Axes, theme: Theme, panel: str, x: str) -> None:
    """The paper's points, a line per method; those of the insets where both are known."""
    points: dict[str, dict[float, float]] = defaultdict(dict)
    for marker in resources.read_csv("paper", "figure2_markers.csv"):
        if marker["panel"] == panel and marker[x] and marker["arch"] != "resnet50":
            points[marker["method"]][float(marker[x])] = float(marker["value"])
    for line in load_table_spec("figure2").paper:
        if line.group.startswith("By model size") == (panel == "a"):
            position = float(line.params_m if panel == "a" else line.epochs)
            points[line.method][position] = line.values["linear"]
    for method in sorted(
        points, key=lambda method: (ORDER.index(method) if method in ORDER else len(ORDER), method)
    ):
        xs, ys = zip(*sorted(points[method].items()), strict=True)
        style: dict[str, Any] = {
            "color": theme.color(method),
            "marker": MARKERS.get(method, "o"),
            "markersize": 5,
        }
        width = 2.0 if method == "Mugs" else 1.2
        axes.plot(xs, ys, label=f"{method} (paper)", linewidth=width, **style)


def _ours(axes: Axes, theme: Theme, points: Sequence[tuple[float, Cell]]) -> None:
    if points:
        xs, cells = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        errors = [cell.spread or 0.0 for cell in cells]
        style: dict[str, Any] = {
            "fmt": "*",
            "markersize": 11,
            "capsize": 3,
            "color": theme.ours,
            "zorder": 5,
        }
        axes.errorbar(xs, [cell.value for cell in cells], yerr=errors, label="Mugs (ours)", **style)


def _axes(axes: Axes, label: str, ticks: Sequence[int], title: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_title(title, loc="left")


def _entries(*panels: Axes) -> dict[str, Any]:
    """Legend entries of several panels, each label once."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return dict(sorted(found.items(), key=lambda entry: entry[0] != "Mugs (ours)"))
