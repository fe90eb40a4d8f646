"""Pictures that stages leave: outputs whose label begins with `pictures` or `figure`."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from results.runs import Run

WIDTH = 900
ENOUGH = 150_000  # bytes
MOST = 40


@dataclass(frozen=True)
class Picture:
    """An image of a run."""

    run: Run
    label: str
    path: Path

    @property
    def title(self) -> str:
        """`pictures: 0003, run 12ab (ade20k_segmentation ade20k)`."""
        name = self.label.replace("_", " ")
        name = name if self.path.stem == self.label else f"{name}: {self.path.stem}"
        return f"{name}, run {self.run.run_id} ({self.run.stage} {self.run.name})"


def pictures(runs: Iterable[Run], root: Path) -> list[Picture]:
    """PNG files of every such output, a folder's sorted; at most 40."""
    found = []
    for run in runs:
        for label, output in sorted(run.outputs.items()):
            if label.startswith(("pictures", "figure")):
                path = root / output
                files = sorted(path.glob("**/*.png")) if path.is_dir() else [path]
                found += [Picture(run, label, file) for file in files if file.suffix == ".png" and file.is_file()]
    return found[:MOST]


def small(path: Path, width: int = WIDTH) -> tuple[bytes, str]:
    """The picture and its format: as it is where it is small, else scaled down to a width and, if need be, a JPEG."""
    from PIL import Image

    content = path.read_bytes()
    with Image.open(path) as image:
        if image.width <= width and len(content) <= ENOUGH:
            return content, "png"
        height = round(image.height * min(1.0, width / image.width))
        reduced = image.convert("RGB").resize((min(width, image.width), max(1, height)))
    for quality in (85, 70, 50):
        buffer = io.BytesIO()
        reduced.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= ENOUGH:
            break
    return buffer.getvalue(), "jpeg"
