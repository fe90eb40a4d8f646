"""How every figure looks, and how it is written as the same bytes each time."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.files import check_overwrite, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["svg", "png"]
FORMATS: tuple[Format, ...] = ("png", "svg")
# In the head of every file, by which we know that it may be replaced.
MARK = "mugs-repro figures"


@dataclass(frozen=True)
class Theme:
    """Colors of a figure: text, faint lines, methods of the paper, and series, ours first."""

    background: str
    text: str
    faint: str
    methods: dict[str, str]
    series: tuple[str, ...]

    @property
    def ours(self) -> str:
        """Color of our results."""
        return self.series[0]

    def color(self, method: str) -> str:
        """Return the color of a method of the paper."""
        return self.methods.get(method, self.methods["other"])

    def one_of(self, number: int) -> str:
        """Return the color of one of several series; after the last color the first one follows."""
        return self.series[number % len(self.series)]


# Every color but the faint one has a contrast of at least 4.5:1 on its background (WCAG AA).
LIGHT = Theme(
    "#ffffff",
    "#1f2933",
    "#c4ccd4",
    {"Mugs": "#1f5fbf", "iBOT": "#0f766e", "DINO": "#7a3e9d", "other": "#64748b"},
    (
        "#b3400e",
        "#1f5fbf",
        "#0f766e",
        "#7a3e9d",
        "#8a6d00",
        "#be185d",
        "#3f6212",
        "#475569",
        "#0369a1",
        "#7f1d1d",
    ),
)
DARK = Theme(
    "#14181d",
    "#e4e9ee",
    "#47525e",
    {"Mugs": "#7db4ff", "iBOT": "#4fd1c0", "DINO": "#d0a2f2", "other": "#a3b1c2"},
    (
        "#ff9d5c",
        "#7db4ff",
        "#4fd1c0",
        "#d0a2f2",
        "#e3c341",
        "#ff8fbf",
        "#a3d977",
        "#a3b1c2",
        "#5cc8ff",
        "#ff9a9a",
    ),
)
MARKERS = {"Mugs": "o", "iBOT": "s", "DINO": "^", "MoCo-v3": "D", "MST": "X"}


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn in any theme."""

    name: str
    title: str
    caption: str
    draw: Callable[[Theme], Figure]


def matplotlib_settings(theme: Theme) -> dict[Any, Any]:
    """Return the matplotlib settings of a theme."""
    return {
        # Without a salt, the ids inside an SVG are random.
        "svg.hashsalt": "mugs-repro",
        # Text as paths looks the same without the font, which matplotlib itself ships.
        "svg.fonttype": "path",
        # A `$` in the name of a run or a method begins no formula, which could not be read.
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.5,
        "grid.color": theme.faint,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.text,
        "axes.titlecolor": theme.text,
        "text.color": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
        "legend.frameon": False,
    }


def render_image(drawing: Drawing, theme: Theme, fmt: Format) -> bytes:
    """Return a drawing as an image file: the same bytes for the same numbers."""
    import matplotlib

    # No display on a compute node.
    matplotlib.use("Agg")
    # The files have no date; matplotlib all the same fails on a value that is none.
    os.environ.pop("SOURCE_DATE_EPOCH", None)
    buffer = io.BytesIO()
    # For this figure only: settings are global in matplotlib.
    with matplotlib.rc_context(matplotlib_settings(theme)):
        figure = drawing.draw(theme)
        # By default a file says when, and by which version of matplotlib, it was made.
        metadata = {"Date": None, "Creator": MARK} if fmt == "svg" else {"Software": MARK}
        figure.savefig(
            buffer, format=fmt, dpi=160, bbox_inches="tight", pad_inches=0.08, metadata=metadata
        )
    return buffer.getvalue()


def data_uri(content: bytes, fmt: str) -> str:
    """Return an image as the `src` of an `<img>`, so that a page needs no other file."""
    kind = "image/svg+xml" if fmt == "svg" else f"image/{fmt}"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def write_figures(drawings: list[Drawing], out_dir: Path, *, force: bool = False) -> list[Path]:
    """Write every drawing as PNG and SVG in the light theme; return the paths.

    Raises:
        OverwriteError: a file there is none of ours, and `force` is not given.
    """
    files = {
        out_dir / f"{drawing.name}.{fmt}": (drawing, fmt) for drawing in drawings for fmt in FORMATS
    }
    # All are looked at before the first is written.
    for path in files:
        check_overwrite(path, MARK, force=force)
    return [
        write_atomic(path, render_image(drawing, LIGHT, fmt))
        for path, (drawing, fmt) in files.items()
    ]
