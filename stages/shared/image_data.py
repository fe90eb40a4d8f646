"""Image data sets: what a reproduction says of one, and its files, opened and checked."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline import runfile
from pipeline.settings import RequiredAtRun, Runtime
from pipeline.spec import StageConfig

if TYPE_CHECKING:
    from mugs.data.sources.base import FolderSource
    from mugs.data.sources.expected import ExpectedCounts


BUILTIN = {
    "builtin:sklearn_digits": "mugs.data.mini.digits:materialize_digits",
    "builtin:sklearn_photo_patches": "mugs.data.mini.photographs:materialize_patches",
}
"""Images that come with scikit-learn: what writes them as an image folder, `train/` and `val/` in it."""


PUBLIC = ("cifar10", "cifar100", "inat18", "inat19", "flowers102", "cars")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(StageConfig):
    """What the data set is. Its name and counts are its identity; where it lies does not enter the run id.

    Images are looked for in `<dir>/<class>/`. `train_list` and `val_list` are text files that name them instead, a path
    relative to the folder a line, or path, space, class; their number then has to be declared. `num_classes: 0` is for
    images without labels, `num_val_images: 0` for a data set without validation images. Counts are those of the files
    found, `allow_bad` included; of imagenet1k and the public data sets they are known. Those of `PUBLIC` are read from
    `root` as they are downloaded (layouts: `mugs/data/sources/public.py`), unless folders are given.
    """

    # Name in result rows and tables; the counts of known names are checked.
    dataset: Annotated[str, Field(min_length=1)]
    # Expected number of classes; 0 for images without labels.
    num_classes: NonNegativeInt | None = None
    # Expected number of training images; needed with a list.
    num_train_images: PositiveInt | None = None
    # Expected number of validation images; 0 for none, needed with a list.
    num_val_images: NonNegativeInt | None = None
    # Images, as `class/file`, that are left out if they do not decode.
    allow_bad: tuple[str, ...] = ()
    # Folder with a folder for each class.
    train_dir: RequiredAtRun[str | None] = None
    # The same for validation.
    val_dir: RequiredAtRun[str | None] = None
    # Folder of a public data set as it was downloaded, instead of the two folders.
    root: RequiredAtRun[str | None] = None
    # Text file that names the images below `train_dir`: a path per line, or path, space, class.
    train_list: Runtime[str | None] = None
    # The same for validation.
    val_list: Runtime[str | None] = None
    threads: Runtime[PositiveInt] = 4

    def __post_init__(self) -> None:
        """Set the folders that the data set does not need to "", and refuse what does not go together."""
        given = (self.train_dir, self.val_dir, self.train_list, self.val_list)
        public = self.dataset in PUBLIC and not any(given)
        if not public and self.root:
            raise ValueError(
                f"root is for {', '.join(PUBLIC)} without folders; "
                "other data sets need train_dir and val_dir"
            )
        unneeded = ["train_dir", "val_dir"] if public else ["root"]
        if self.num_val_images == 0:
            unneeded.append("val_dir")
        for name in unneeded:
            # None would mean: to be set before the run starts.
            object.__setattr__(self, name, getattr(self, name) or "")
        self._check_lists()

    def _check_lists(self) -> None:
        for split in ("train", "val"):
            listed = getattr(self, f"{split}_list") is not None
            if listed and getattr(self, f"num_{split}_images") is None:
                raise ValueError(
                    f"{split}_list needs num_{split}_images: how many images the list names"
                )
        folders = {folder for folder in (self.train_dir, self.val_dir) if folder}
        if len(folders) > 1 and folders & set(BUILTIN):
            raise ValueError(
                "train_dir and val_dir must name the same built-in data set, "
                f"not {' and '.join(sorted(folders))}"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits there are."""
        return ("train",) if self.num_val_images == 0 else ("train", "val")


def open_data_set(cfg: ConvertConfig) -> "dict[str, FolderSource]":
    """The splits of a data set that is not built in, looked through once. Raises SourceError, ValueError as `run`."""
    found = looked_through(cfg)
    if isinstance(found, ValueError):
        raise found
    return found


@cache
def looked_through(cfg: ConvertConfig) -> "dict[str, FolderSource] | ValueError":
    """Those splits, or what is wrong with them."""
    try:
        return open_splits(Path(), cfg)
    except ValueError as error:
        return error


def num_images(cfg: ConvertConfig) -> int:
    """Images of all splits as declared or known; 0 for what is neither."""
    images = expected_layout(cfg).images or {}
    return sum(images.get(split) or 0 for split in cfg.splits)


def expected_layout(cfg: ConvertConfig) -> "ExpectedCounts":
    """Classes and images as declared, or else known."""
    from mugs.data.sources.expected import ExpectedCounts

    images = {"train": cfg.num_train_images, "val": cfg.num_val_images}
    return ExpectedCounts(cfg.num_classes, images).or_known(cfg.dataset)


def open_splits(run_dir: Path, cfg: ConvertConfig) -> "dict[str, FolderSource]":
    """The images of each split, their layout checked: SourceError names all that is wrong with any of them."""
    from mugs.data.sources.base import SourceError
    from mugs.data.sources.expected import check_expected_counts
    from mugs.data.sources.listing import open_images
    from mugs.data.sources.public import open_public

    good: dict[str, FolderSource] = {}
    bad: dict[str, SourceError] = {}
    for split in cfg.splits:
        listed = getattr(cfg, f"{split}_list")
        try:
            if cfg.root:
                good[split] = open_public(cfg.dataset, Path(cfg.root).expanduser(), split)
                continue
            folder = find_image_folder(getattr(cfg, f"{split}_dir"), split, run_dir)
            list_file = None if listed is None else Path(listed).expanduser()
            good[split] = open_images(folder, list_file, labeled=cfg.num_classes != 0)
        except SourceError as error:
            bad[split] = error
    check_expected_counts(cfg.dataset, {**good, **bad}, expected_layout(cfg))
    return good


def find_image_folder(folder: str | None, split: str, run_dir: Path) -> Path:
    """The folder to convert; built-in images are first written as JPEG files below the run's folder."""
    if folder is None:
        raise ValueError(f"{split}_dir is not set")
    if folder in BUILTIN:
        images = run_dir / "images"
        runfile.import_by_name(BUILTIN[folder])(images)
        return images / split
    if folder.startswith("builtin:"):
        raise ValueError(f"{split}_dir: there is no {folder} (valid: {', '.join(BUILTIN)})")
    path = Path(folder).expanduser()
    if not path.is_dir():
        from mugs.data.sources.base import SourceError

        raise SourceError(f"{split}_dir: {path} is not a folder")
    return path
