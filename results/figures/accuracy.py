"""Figure 2 of the paper with ours over it, and k-NN over pretraining epochs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from results import resources
from results.cells import Cell
from results.figures.style import MARKERS, Drawing, Theme
from results.schema import Result
from results.spec import load
from results.tables import build

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORDER = ("Mugs", "iBOT", "DINO")
PARAMS = {"ViT-S/16": 21, "ViT-B/16": 85, "ViT-L/16": 307}


def figure2(results: Sequence[Result]) -> Drawing:
    """Linear probing by model size and by epochs: printed insets, digitised markers of other methods, ours."""
    table = build("figure2", results)
    ours = {
        (entry.group, entry.arch, entry.epochs): line.cells["linear"]
        for entry in table.printed.entries
        for line in entry.ours[:1]
        if "linear" in line.cells
    }

    def draw(theme: Theme) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _printed(left, theme, "a", "params_m")
        _printed(right, theme, "b", "epochs")
        size = [(PARAMS[arch], cell) for (group, arch, _), cell in ours.items() if "size" in group]
        length = [(int(epochs), cell) for (group, _, epochs), cell in ours.items() if "epochs" in group]
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
    for line in load("figure2").paper:
        if line.group.startswith("By model size") == (panel == "a"):
            position = float(line.params_m if panel == "a" else line.epochs)
            points[line.method][position] = line.values["linear"]
    for method in sorted(points, key=lambda method: (ORDER.index(method) if method in ORDER else len(ORDER), method)):
        found = points[method]
        xs = sorted(found)
        style: dict[str, Any] = {"color": theme.color(method), "marker": MARKERS.get(method, "o"), "markersize": 5}
        width = 2.0 if method == "Mugs" else 1.2
        axes.plot(xs, [found[x] for x in xs], label=f"{method} (paper)", linewidth=width, **style)


def _ours(axes: Axes, theme: Theme, points: Sequence[tuple[float, Cell]]) -> None:
    if points:
        xs, cells = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        errors = [cell.spread or 0.0 for cell in cells]
        style: dict[str, Any] = {"fmt": "*", "markersize": 11, "capsize": 3, "color": theme.ours, "zorder": 5}
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


def knn_over_epochs(results: Sequence[Result]) -> Drawing | None:
    """k-NN accuracy against pretraining epochs, per architecture and data set; None with fewer than two points."""
    series: dict[str, dict[int, Cell]] = defaultdict(dict)
    table = build("table1", results)
    for entry in (*table.printed.entries, *table.elsewhere.entries):
        for line in entry.ours:
            if "knn" in line.cells:
                cell = line.cells["knn"]
                row = cell.results[0].row
                epochs = 0 if row.method.endswith("(initialisation)") else row.epochs
                suffix = line.label.removeprefix("ours").strip()
                series[f"{entry.arch} on {row.dataset} {suffix}".rstrip()][epochs] = cell
    if not any(len(found) > 1 for found in series.values()):
        return None
    caption = KNN_CAPTION + (KNN_DASHED if _has_small(series) else "")
    return Drawing("knn_over_epochs", "k-NN over pretraining epochs", caption, lambda theme: _draw_knn(series, theme))


KNN_CAPTION = (
    "Best k and temperature of each pretraining. 0 epochs is the network at initialisation; vertical bars are the "
    "standard deviation over seeds."
)
KNN_DASHED = " Dashed: the paper's ViT-S/16 (100, 300 and 800 epochs)."


def _has_small(series: Iterable[str]) -> bool:
    return any("ViT-S/16" in name for name in series)


def _draw_knn(series: dict[str, dict[int, Cell]], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for color, (name, found) in zip((theme.ours, *theme.cycle), sorted(series.items()), strict=False):
        xs = sorted(found)
        errors = [found[x].spread or 0.0 for x in xs]
        axes.errorbar(xs, [found[x].value for x in xs], yerr=errors, marker="o", capsize=3, color=color, label=name)
    if _has_small(series):
        lines = [line for line in load("table1").paper if line.method == "Mugs" and line.arch == "vit_s16"]
        points = sorted((line.pretrain_epochs or 0, line.values["knn"]) for line in lines)
        axes.plot(*zip(*points, strict=True), "--", color=theme.color("Mugs"), label="ViT-S/16, paper")
    axes.set_xlabel("Pretraining epochs")
    axes.set_ylabel("k-NN, top-1 (%)")
    axes.legend()
    return figure
