"""Pictures that stages leave: outputs whose label begins with `pictures` or `figure`."""

import io
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import open_regular_file
from results.runs import FinishedRun
from results.vocabulary import load_vocabulary

logger = logging.getLogger(__name__)

# The report is one file with all pictures inside; these limits keep it small.
MAX_WIDTH = 900
MAX_BYTES = 150_000
MAX_PICTURES = 40  # of all runs together
MAX_PICTURES_PER_OUTPUT = 12
MAX_PIXELS = 40_000_000

# Width over height from which a picture gets more of the page.
WIDE = 3.0

_COLOR = re.compile(r"#[0-9a-fA-F]{6}")
TITLES = {
    "attention": "Attention maps",
    "coco_detection": "Detection and instance segmentation",
    "ade20k_segmentation": "Semantic segmentation",
    "davis_segmentation": "Video object segmentation",
}


@dataclass(frozen=True)
class Gallery:
    """Pictures of one output of a run.

    The run's `info` has the captions of its outputs, and their colors by class.
    """

    run: FinishedRun
    label: str
    paths: tuple[Path, ...]
    left_out: int = 0

    @property
    def title(self) -> str:
        """`Video object segmentation (video), n=7`: stage, run, and the rest of the label."""
        stage = TITLES.get(self.run.stage, self.run.stage)
        rest = self.label.partition("_")[2].replace("_", " ")
        return f"{stage} ({self.run.name})" + (f", {rest}" if rest else "")

    @property
    def caption(self) -> str:
        """Data set and run, what the pictures show, and how many are left out."""
        dataset = self.run.info.get("dataset")
        data = f"Data: {load_vocabulary().dataset_title(dataset)}; run" if dataset else "Run"
        shown = self.run.info.get("captions", {}).get(self.label, "")
        more = f"{self.left_out} more in {self.run.outputs[self.label]}." if self.left_out else ""
        return " ".join(filter(None, (f"{data} {self.run.run_id}.", shown, more)))

    @property
    def colors(self) -> Mapping[str, str]:
        """`#rrggbb` by class; empty if the stage recorded none."""
        found: Mapping[str, str] = self.run.info.get("colours", {}).get(self.label, {})
        # Nothing else goes into a style, which could load a page of somebody else's.
        return {name: color for name, color in found.items() if _COLOR.fullmatch(str(color))}


def collect_galleries(runs: Iterable[FinishedRun], root: Path) -> list[Gallery]:
    """Return a gallery for each output with pictures: its first PNG files, sorted by path."""
    found: list[tuple[FinishedRun, str, list[Path]]] = []
    for run in runs:
        for label, output in sorted(run.outputs.items()):
            if not label.startswith(("pictures", "figure")):
                continue
            path = root / output
            files = sorted(path.glob("**/*.png")) if path.is_dir() else [path]
            if files := [file for file in files if file.suffix == ".png" and _is_picture(file)]:
                found.append((run, label, files))
    # Every output shows at least one picture, so with many outputs there may be more than the
    # limit.
    share = max(1, MAX_PICTURES // max(1, len(found)))
    limit = min(MAX_PICTURES_PER_OUTPUT, share)
    return [
        Gallery(run, label, tuple(files[:limit]), max(0, len(files) - limit))
        for run, label, files in found
    ]


def _is_picture(path: Path) -> bool:
    """Return whether a file is a picture that can be shown; otherwise log why not."""
    from PIL import Image

    try:
        os.close(open_regular_file(path))
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels")
            image.load()
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError: a damaged chunk
        logger.warning("unreadable: %s: %s; it is left out", path, error)
        return False
    return True


def is_wide(path: Path) -> bool:
    """Return whether a picture is a row of several ones."""
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        return image.width >= WIDE * image.height


def shrink_picture(path: Path) -> tuple[bytes, str]:
    """Return a picture and its format: unchanged if it is small, else as a smaller JPEG."""
    from PIL import Image

    content = path.read_bytes()
    with Image.open(path, formats=["PNG"]) as image:
        if image.width <= MAX_WIDTH and len(content) <= MAX_BYTES:
            return content, "png"
        scale = min(1.0, MAX_WIDTH / image.width)
        size = (round(image.width * scale), max(1, round(image.height * scale)))
        reduced = image.convert("RGB").resize(size)
    # If the file is too large even at the lowest quality, it is used all the same.
    for quality in (85, 70, 50):
        buffer = io.BytesIO()
        reduced.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= MAX_BYTES:
            break
    return buffer.getvalue(), "jpeg"
