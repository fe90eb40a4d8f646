"""The labelled part of the training images that a semi-supervised evaluation uses."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pipeline.settings import RequiredAtRun, Settings
from stages.shared.image_data import BUILTIN, ConvertConfig, open_data_set

if TYPE_CHECKING:
    from mugs.data.sources.base import Source
    from mugs.data.sources.subset import Subset


@dataclass(frozen=True, kw_only=True)
class LabelledPart(Settings):
    """Which images keep their labels: those a list names, or `percent` of each class drawn from `seed`.

    The lists of ImageNet-1K are SimCLRv2's, to be fetched by hand: 1percent.txt (12,811 lines) and 10percent.txt
    (128,116 lines) from https://github.com/google-research/simclr/tree/master/imagenet_subsets. Number of lines and,
    where given, `list_sha256` are checked. `last_line: dropped` leaves out the image the release loses (row E7).
    """

    # Share of the training images.
    percent: Annotated[float, Field(gt=0, le=100)]
    # `list`: those that `list_file` names. `class_balanced`: this share of each class, drawn from
    # `seed`.
    by: Literal["list", "class_balanced"] = "list"
    # `dropped` leaves out the image that the release loses (E7).
    last_line: Literal["kept", "dropped"] = "kept"
    # Expected SHA-256 of the list.
    list_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    # Text file with an image per line.
    list_file: RequiredAtRun[str | None] = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Ask for no list where none is read."""
        if self.by == "class_balanced":
            object.__setattr__(self, "list_file", "")

    def choose(self, source: "Source", dataset: str) -> "Subset":
        """The labelled images. Raises SourceError naming what is wrong with the list."""
        from pathlib import Path

        from mugs.data.sources.base import SourceError
        from mugs.data.sources.subset import (
            KNOWN_LINES,
            Subset,
            draw_class_balanced,
            indices_from_list,
        )
        from pipeline.files import hash_file

        if self.by == "class_balanced":
            return Subset(source, draw_class_balanced(source, self.percent, seed=self.seed))
        list_file = Path(self.list_file or "").expanduser()
        lines = KNOWN_LINES.get((dataset, self.percent))
        indices = indices_from_list(
            source, list_file, lines=lines, drop_last=self.last_line == "dropped"
        )
        if self.list_sha256 is not None and (found := hash_file(list_file)) != self.list_sha256:
            raise SourceError(f"{list_file}: SHA-256 {found}, list_sha256 says {self.list_sha256}")
        return Subset(source, indices)

    def look(self, data: ConvertConfig) -> str:
        """What the list names. Raises SourceError as `choose` would, without the images where they are not there."""
        if self.by == "class_balanced":
            return self.words()
        from pathlib import Path

        from mugs.data.sources.subset import read_names

        names = read_names(Path(self.list_file or "").expanduser())
        elsewhere = f"{self.list_file} names {len(names):,} images; whether they are there shows with {data.dataset}"
        if data.train_dir in BUILTIN or data.train_dir is None or data.root is None:
            return elsewhere
        try:
            images = open_data_set(data)["train"]
        except ValueError:
            return elsewhere
        return f"{self.list_file} names {len(self.choose(images, data.dataset)):,} images, of all classes"

    def words(self) -> str:
        """`1% of labels`, for the setting of a result row."""
        return f"{self.percent:g}% of labels"
