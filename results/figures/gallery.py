"""Pictures that stages leave: outputs whose label begins with `pictures` or `figure`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from results.runs import FinishedRun
from results.vocabulary import load_vocabulary

WIDTH = 900
ENOUGH = 150_000  # bytes
MOST = 40  # of all runs together
MOST_OF_ONE = 12
WIDE = 3.0  # width over height of pictures that get more of the page
TITLES = {
    "attention": "Attention maps",
    "coco_detection": "Detection and instance segmentation",
    "ade20k_segmentation": "Semantic segmentation",
    "davis_segmentation": "Video object segmentation",
}


@dataclass(frozen=True)
class Gallery:
    """Pictures of an output of a run. The run's `info` has the captions, and the colours by class, of its outputs."""

    run: FinishedRun
    label: str
    paths: tuple[Path, ...]
    left_out: int = 0

    @property
    def title(self) -> str:
        """`Video object segmentation (video), n=7`: stage, run, and what follows `pictures` in the label."""
        rest = self.label.partition("_")[2].replace("_", " ")
        return f"{TITLES.get(self.run.stage, self.run.stage)} ({self.run.name})" + (
            f", {rest}" if rest else ""
        )

    @property
    def caption(self) -> str:
        """Data set and run, what is seen, and how many pictures are not."""
        dataset = self.run.info.get("dataset")
        data = f"Data: {load_vocabulary().dataset_title(dataset)}; run" if dataset else "Run"
        parts = [
            f"{data} {self.run.run_id}.",
            self.run.info.get("captions", {}).get(self.label, ""),
        ]
        if self.left_out:
            parts.append(f"{self.left_out} more in {self.run.outputs[self.label]}.")
        return " ".join(filter(None, parts))

    @property
    def colours(self) -> Mapping[str, str]:
        """`#rrggbb` by class; none where the stage says none."""
        found: Mapping[str, str] = self.run.info.get("colours", {}).get(self.label, {})
        return found


def collect_galleries(runs: Iterable[FinishedRun], root: Path) -> list[Gallery]:
    """The PNG files of every such output, a folder's sorted; the first ones, 40 in all, as many of each as go."""
    found: list[tuple[FinishedRun, str, list[Path]]] = []
    for run in runs:
        for label, output in sorted(run.outputs.items()):
            if label.startswith(("pictures", "figure")):
                path = root / output
                files = sorted(path.glob("**/*.png")) if path.is_dir() else [path]
                found.append(
                    (
                        run,
                        label,
                        [file for file in files if file.suffix == ".png" and file.is_file()],
                    )
                )
    filled = [entry for entry in found if entry[2]]
    most = min(MOST_OF_ONE, max(1, MOST // max(1, len(filled))))
    return [
        Gallery(run, label, tuple(files[:most]), max(0, len(files) - most))
        for run, label, files in filled
    ]


def is_wide(path: Path) -> bool:
    """Whether a picture is many in a row."""
    from PIL import Image

    with Image.open(path) as image:
        return image.width >= WIDE * image.height


def shrink_picture(path: Path) -> tuple[bytes, str]:
    """The picture and its format: as it is where it is small, else a JPEG, at most 900 pixels wide."""
    from PIL import Image

    content = path.read_bytes()
    with Image.open(path) as image:
        if image.width <= WIDTH and len(content) <= ENOUGH:
            return content, "png"
        scale = min(1.0, WIDTH / image.width)
        reduced = image.convert("RGB").resize(
            (round(image.width * scale), max(1, round(image.height * scale)))
        )
    for quality in (85, 70, 50):
        buffer = io.BytesIO()
        reduced.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= ENOUGH:
            break
    return buffer.getvalue(), "jpeg"
