"""Training curves of pretraining runs, with the calibration band, from their metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from results.figures.style import Drawing, Theme
from results.runs import FinishedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = 0.02
POINTS = 600
TITLES = {"lr": "Learning rate", "images_per_second": "Images per second"}
TERMS = ("total", "instance", "local_group", "group")


@dataclass(frozen=True)
class Curves:
    """Lines of a metrics.jsonl: steps, and the means of whole epochs beside a released run's."""

    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]

    @property
    def steps_per_epoch(self) -> float:
        """Steps of an epoch, from the last line."""
        last = self.steps[-1]
        return float((last["step"] + 1) / (last["epoch"] + 1))


def read_curves(path: Path) -> Curves | None:
    """The curves of a run, None where there are none; of steps written twice (after a restart) the later ones count."""
    if not path.is_file():
        return None
    steps: dict[int, dict[str, Any]] = {}
    epochs: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "calibration" in line:
            epochs[line["epoch"]] = line["calibration"]
        elif "loss" in line and "step" in line:
            steps[line["step"]] = line
    if not steps:
        return None
    return Curves(
        [steps[key] for key in sorted(steps)], [{"epoch": k, **epochs[k]} for k in sorted(epochs)]
    )


def draw_training_curves(run: FinishedRun, root: Path) -> Drawing | None:
    """Losses and learning rate of a pretraining over epochs."""
    curves = read_curves(root / run.folder / "metrics.jsonl")
    if curves is None:
        return None
    name = f"{run.name} ({run.run_id})"
    caption = f"Means over the logged steps of run {run.run_id}, and over all ranks."
    if curves.epochs:
        caption += (
            f" Points: means of whole epochs; band: those of the released run ± {100 * BAND:g}%."
        )
    return Drawing(
        f"curves_{run.run_id}",
        f"Training curves of {name}",
        caption,
        lambda theme: _draw(curves, theme),
    )


def _draw(curves: Curves, theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    terms = [term for term in TERMS if _key(term) in curves.steps[0]]
    rest = ("lr", "images_per_second")
    rows = (len(terms) + len(rest) + 1) // 2
    lines = average_in_bins(curves.steps)
    figure = Figure(figsize=(8.6, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, 2).ravel()
    xs = [(line["step"] + 1) / curves.steps_per_epoch for line in lines]
    for axes, term in zip(panels, terms, strict=False):
        axes.plot(xs, [line[_key(term)] for line in lines], color=theme.ours, linewidth=1)
        axes.set_title(f"{term.replace('_', '-').capitalize()} loss", loc="left")
        _band(axes, curves.epochs, term, theme)
    for axes, key in zip(panels[len(terms) :], rest, strict=False):
        axes.plot(xs, [line.get(key) for line in lines], color=theme.one_of(1), linewidth=1)
        axes.set_title(TITLES[key], loc="left")
    for axes in panels[len(terms) + len(rest) :]:
        axes.set_axis_off()
    for axes in panels[-2:]:
        axes.set_xlabel("Epochs")
    return figure


def average_in_bins(lines: Sequence[dict[str, Any]], most: int = POINTS) -> list[dict[str, Any]]:
    """At most so many lines: means of equal runs of lines, each at its last step."""
    size = -(-len(lines) // most)
    parts = [lines[start : start + size] for start in range(0, len(lines), size)]
    return [_mean(part) for part in parts]


def _mean(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of the numbers that all lines have, and the last step."""
    shared = [
        key for key in lines[-1] if all(isinstance(line.get(key), int | float) for line in lines)
    ]
    return {
        **{key: fmean(line[key] for line in lines) for key in shared},
        "step": lines[-1]["step"],
    }


def _key(term: str) -> str:
    return "loss" if term == "total" else f"loss_{term}"


def _band(axes: Axes, epochs: Sequence[dict[str, Any]], term: str, theme: Theme) -> None:
    """Mean losses of whole epochs, drawn in their middle, over the band around those of the released run."""
    found = [line for line in epochs if term in line["target"]]
    if not found:
        return
    xs = [line["epoch"] + 0.5 for line in found]
    target = [line["target"][term] for line in found]
    low, high = [(1 - BAND) * value for value in target], [(1 + BAND) * value for value in target]
    axes.fill_between(
        xs, low, high, color=theme.color("Mugs"), alpha=0.3, linewidth=0, label="released run"
    )
    axes.plot(
        xs,
        [line["ours"][term] for line in found],
        "o",
        color=theme.ours,
        markersize=4,
        label="ours",
    )
    if term == "total":
        axes.legend()
