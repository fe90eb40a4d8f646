"""The labelled part of the training images that a semi-supervised evaluation uses."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pipeline.files import expand_home
from pipeline.settings import RequiredAtRun, Settings
from pipeline.spec import StageConfig
from stages.shared.batch_checks import check_batch_is_filled
from stages.shared.image_data import BUILTIN, ConvertConfig, open_data_set

if TYPE_CHECKING:
    from mugs.data.sources.base import Source
    from mugs.data.sources.folder import FolderSource
    from mugs.data.sources.subset import Subset


@dataclass(frozen=True, kw_only=True)
class LabelledPart(Settings):
    """Which images keep their labels: those in a list, or `percent` of each class, by `seed`.

    The lists of ImageNet-1K are SimCLRv2's, to be downloaded by hand: 1percent.txt (12,811 lines)
    and 10percent.txt (128,116 lines) from
    https://github.com/google-research/simclr/tree/master/imagenet_subsets. The number of lines
    and, if given, `list_sha256` are checked. `last_line: dropped` leaves out the image that the
    release loses (E7).
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
        """Need no list if none is read, and refuse settings of the other way."""
        other = ("list_sha256", "last_line") if self.by == "class_balanced" else ("seed",)
        for name in other:
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} has no effect with by: {self.by}; leave it out")
        if self.by == "class_balanced":
            # None would mean: to be set before the run starts.
            object.__setattr__(self, "list_file", "")

    @property
    def _list_path(self) -> Path:
        return expand_home(self.list_file or "")

    def select_images(self, source: "Source", dataset: str) -> "Subset":
        """Return the labelled images.

        Raises:
            SourceError: names what is wrong with the list.
        """
        from mugs.data.sources import subset
        from mugs.data.sources.base import SourceError
        from pipeline.files import hash_file

        if self.by == "class_balanced":
            indices = subset.draw_class_balanced(source, self.percent, seed=self.seed)
            return subset.Subset(source, indices)
        indices = subset.indices_from_list(
            source,
            self._list_path,
            lines=subset.KNOWN_LINES.get((dataset, self.percent)),
            drop_last=self.last_line == "dropped",
        )
        if (
            self.list_sha256 is not None
            and (found := hash_file(self._list_path)) != self.list_sha256
        ):
            raise SourceError(
                f"{self._list_path}: SHA-256 {found}, list_sha256 says {self.list_sha256}"
            )
        return subset.Subset(source, indices)

    def check_list(self, data: ConvertConfig) -> tuple[str, int | None]:
        """Return what the list names, and how many images keep their labels, if that is known.

        Raises:
            SourceError: names what is wrong with the list.
        """
        images = find_train_images(data)
        if self.by == "class_balanced":
            count = None if images is None else len(self.select_images(images, data.dataset))
            return self.describe(), count
        from mugs.data.sources.subset import read_names

        names = read_names(self._list_path)
        unknown = (
            f"{self.list_file} names {len(names):,} images; "
            f"whether they are there shows with {data.dataset}"
        )
        if images is None:
            return unknown, None
        count = len(self.select_images(images, data.dataset))
        return f"{self.list_file} names {count:,} images, of all classes", count

    def describe(self) -> str:
        """Return e.g. "1% of labels", for the setting of a result row."""
        return f"{self.percent:g}% of labels"


def find_train_images(data: ConvertConfig) -> "FolderSource | None":
    """Return the training images; None if they cannot be listed before a run."""
    # Built-in images exist only once a run has written them.
    if data.train_dir in BUILTIN or data.train_dir is None or data.root is None:
        return None
    try:
        return open_data_set(data)["train"]
    except ValueError:
        # The check of the data set itself reports this.
        return None


def check_labelled_part(cfg: Any, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """Return what the list of `cfg.labelled` names, if there is one; no bytes will be written.

    Raises:
        SourceError: names what is wrong with the list.
    """
    data = inputs["data"]
    assert isinstance(data, ConvertConfig)
    if not cfg.labelled:
        return "all labels", 0.0
    words, images = cfg.labelled.check_list(data)
    # Logistic regression has no batches.
    batch_size = getattr(cfg, "batch_size", None)
    if batch_size is not None and images is not None:
        check_batch_is_filled(batch_size, images)
    return words, 0.0
