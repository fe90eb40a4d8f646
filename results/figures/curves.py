"""Training curves of pretraining runs, with the calibration band, from their metrics.jsonl."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pipeline.files import read_bounded
from results.figures.style import Drawing, Theme
from results.runs import FinishedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

# Bytes; a line for each step of 800 epochs of ImageNet has about half of it.
_LONGEST = 1 << 29

# Relative width of the band around the losses of the released run.
BAND = 0.02

# Points of a curve: an SVG with every logged step would be larger than the rest of the report.
MAX_POINTS = 600

TITLES = {"lr": "Learning rate", "images_per_second": "Images per second"}
TERMS = ("total", "instance", "local_group", "group")


@dataclass(frozen=True)
class Curves:
    """Lines of a metrics.jsonl: steps, and means of epochs beside those of the released run."""

    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]

    @property
    def steps_per_epoch(self) -> float:
        """Steps of an epoch, derived from the last line."""
        last = self.steps[-1]
        return float((last["step"] + 1) / (last["epoch"] + 1))


def read_curves(path: Path) -> Curves | None:
    """Return the curves of a run; None if it has none.

    A run that resumed from a checkpoint writes some steps again; their later lines count.
    """
    try:
        content = read_bounded(path, _LONGEST)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("unreadable: %s: %s; its curves are left out", path, error.strerror)
        return None
    steps: dict[int, dict[str, Any]] = {}
    epochs: dict[int, dict[str, Any]] = {}
    for text in content.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # cut off when the job was killed, or none of ours
            continue
        if not is_line(line):
            continue
        # Two kinds of lines: means of an epoch beside the released run, and logged steps.
        if "calibration" in line:
            epochs[line["epoch"]] = line["calibration"]
        elif "loss" in line and "step" in line:
            steps[line["step"]] = line
    if not steps:
        return None
    return Curves(
        steps=[steps[step] for step in sorted(steps)],
        epochs=[{"epoch": epoch, **epochs[epoch]} for epoch in sorted(epochs)],
    )


def is_line(line: object) -> bool:
    """Return whether it may be a line of ours: what is drawn of it is finite numbers."""
    if not isinstance(line, dict) or not is_number(line.get("step")):
        return False
    drawn = [line["step"], line.get("epoch")]
    if "calibration" in line:
        means = line["calibration"]
        found = [means.get(side) for side in ("ours", "target")] if isinstance(means, dict) else []
        sides = [side for side in found if isinstance(side, dict)]
        if len(sides) != 2:
            return False
        drawn += [value for side in sides for value in side.values()]
        if not sides[0].keys() >= sides[1].keys():
            return False
    else:
        drawn += [line[key] for key in (*map(_key, TERMS), *TITLES) if key in line]
    return all(map(is_number, drawn))


def is_number(value: object) -> bool:
    """Return whether a value of JSON is a number that can be drawn."""
    return isinstance(value, int | float) and abs(value) < 1e15


def draw_training_curves(run: FinishedRun, root: Path) -> Drawing | None:
    """Return losses, learning rate and speed of a pretraining; None if it has no log."""
    curves = read_curves(root / run.folder / "metrics.jsonl")
    if curves is None:
        return None
    caption = f"Means over the logged steps of run {run.run_id}, and over all ranks."
    if curves.epochs:
        caption += (
            f" Points: means of whole epochs; band: those of the released run ± {100 * BAND:g}%."
        )
    return Drawing(
        f"curves_{run.run_id}",
        f"Training curves of {run.name} ({run.run_id})",
        caption,
        lambda theme: _draw(curves, theme),
    )


def _draw(curves: Curves, theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    # Other methods and ablations log fewer terms.
    terms = [term for term in TERMS if _key(term) in curves.steps[0]]
    rows = (len(terms) + len(TITLES) + 1) // 2
    lines = average_in_bins(curves.steps)
    figure = Figure(figsize=(8.6, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, 2).ravel()
    # A step counts when it is finished: the first one ends at 1 / steps_per_epoch.
    xs = [(line["step"] + 1) / curves.steps_per_epoch for line in lines]
    # The terms fill the first panels, the other curves follow, and a last panel may stay empty.
    for axes, term in zip(panels, terms, strict=False):
        axes.plot(xs, [line[_key(term)] for line in lines], color=theme.ours, linewidth=1)
        axes.set_title(f"{term.replace('_', '-').capitalize()} loss", loc="left")
        _band(axes, curves.epochs, term, theme)
    for axes, (key, title) in zip(panels[len(terms) :], TITLES.items(), strict=False):
        axes.plot(xs, [line.get(key) for line in lines], color=theme.one_of(1), linewidth=1)
        axes.set_title(title, loc="left")
    for axes in panels[len(terms) + len(TITLES) :]:
        axes.set_axis_off()
    for axes in panels[-2:]:
        axes.set_xlabel("Epochs")
    return figure


def average_in_bins(
    lines: Sequence[dict[str, Any]], most: int = MAX_POINTS
) -> list[dict[str, Any]]:
    """Return at most `most` lines: means of equally long stretches, each at its last step."""
    size = -(-len(lines) // most)  # rounded up
    return [_mean(lines[start : start + size]) for start in range(0, len(lines), size)]


def _mean(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means of the numbers that all lines have, and the last step."""
    last = lines[-1]
    keys = [k for k in last if all(isinstance(line.get(k), int | float) for line in lines)]
    return {key: fmean(line[key] for line in lines) for key in keys} | {"step": last["step"]}


def _key(term: str) -> str:
    return "loss" if term == "total" else f"loss_{term}"


def _band(axes: Axes, epochs: Sequence[dict[str, Any]], term: str, theme: Theme) -> None:
    """Draw mean losses of whole epochs, at their middle, over the band of the released run."""
    found = [line for line in epochs if term in line["target"]]
    if not found:
        return
    xs = [line["epoch"] + 0.5 for line in found]
    target = [line["target"][term] for line in found]
    axes.fill_between(
        xs,
        [(1 - BAND) * value for value in target],
        [(1 + BAND) * value for value in target],
        color=theme.color("Mugs"),
        alpha=0.3,
        linewidth=0,
        label="released run",
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
