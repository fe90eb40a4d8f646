"""Image data sets: what a reproduction says of one, and its files, opened and checked."""

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from pipeline import runfile
from pipeline.files import expand_home
from pipeline.settings import Added, InputPath, RequiredAtRun, Runtime
from pipeline.spec import Label, StageConfig

if TYPE_CHECKING:
    from mugs.data.sources.expected import ExpectedCounts
    from mugs.data.sources.folder import FolderSource


# Images that come with scikit-learn. Each entry names the function that writes them as an image
# folder with `train/` and `val/`; as text, so that a plan imports neither it nor scikit-learn.
BUILTIN = {
    "builtin:sklearn_digits": "mugs.data.mini.digits:materialize_digits",
    "builtin:sklearn_photo_patches": "mugs.data.mini.photographs:materialize_patches",
}


# Read by `mugs.data.sources.public`; CONTRIBUTING.md lists what else a new one needs.
PUBLIC = ("cifar10", "cifar100", "inat18", "inat19", "flowers102", "cars")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(StageConfig):
    """An image data set; its name and counts are in the run id, its location is not.

    Images are read from `<dir>/<class>/`. `train_list` and `val_list` are text files that name
    them instead, one per line: a path relative to the folder, or path, space, class. Their number
    then has to be declared. `num_classes: 0` is for images without labels, `num_val_images: 0` for
    a data set without validation images. Counts are those of the files found, including
    `allow_bad`; for imagenet1k and the public data sets they are known. The data sets in `PUBLIC`
    are read from `root` as they are downloaded (layouts: `mugs/data/sources/public.py`), unless
    folders are given. `train_dir` and `val_dir` may also name a tar file, a parquet file, or a
    folder or pattern of them (`mugs/data/sources/packed.py` says which kinds): nothing is unpacked,
    and the run is the same as that of these images in folders.
    """

    one_rank: ClassVar[bool] = True

    # Name in result rows and tables; the counts of known names are checked.
    dataset: Label
    # Expected number of classes; 0 for images without labels.
    num_classes: NonNegativeInt | None = None
    # Expected number of training images; needed with a list.
    num_train_images: PositiveInt | None = None
    # Expected number of validation images; 0 for none, needed with a list.
    num_val_images: NonNegativeInt | None = None
    # Images, as `class/file`, that are left out if they do not decode.
    allow_bad: tuple[str, ...] = ()
    # How images are stored that are not RGB or gray JPEG: as JPEG of quality 95 (CIFAR: 100), or as
    # they are (CIFAR: as PNG), which changes no pixel (M40).
    storage: Added[Literal["jpeg", "original"]] = "jpeg"
    # Folder with a folder for each class.
    train_dir: RequiredAtRun[str | None] = None
    # The same for validation.
    val_dir: RequiredAtRun[str | None] = None
    # Folder of a public data set as it was downloaded, instead of the two folders.
    root: RequiredAtRun[str | None] = None
    # Text file that names the images below `train_dir`: a path per line, or path, space, class.
    train_list: InputPath[str | None] = None
    # The same for validation.
    val_list: InputPath[str | None] = None
    # Text file with the classes of images in a tar file without class folders, a line for each:
    # name, space, class; or a class alone, in the order of the names. ImageNet's development kit.
    train_labels: InputPath[str | None] = None
    # The same for validation.
    val_labels: InputPath[str | None] = None
    threads: Runtime[PositiveInt] = 4

    def __post_init__(self) -> None:
        """Set the folders that the data set does not need to "", and refuse contradictions."""
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
            # A list may be cut short unnoticed, so its length has to be known from elsewhere.
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

    def list_remarks(self, inputs: Mapping[str, StageConfig]) -> list[str]:
        """Remark on validation images that are the training images."""
        folders = [self.train_dir, self.val_dir]
        lists = [self.train_list, self.val_list]
        if not all(folders) or self.train_dir in BUILTIN or lists[0] != lists[1]:
            return []
        train, val = (os.path.realpath(expand_home(str(folder))) for folder in folders)
        if train != val:
            return []
        return [
            "train_dir and val_dir are the same folder: evaluations will test on the images that "
            "they train on"
        ]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the data set."""
        return ("train",) if self.num_val_images == 0 else ("train", "val")

    @property
    def expected_counts(self) -> "ExpectedCounts":
        """Classes and images as declared, or else as known for a data set of this name."""
        from mugs.data.sources.expected import ExpectedCounts

        images = {"train": self.num_train_images, "val": self.num_val_images}
        return ExpectedCounts(self.num_classes, images).or_known(self.dataset)

    def count_images(self) -> int:
        """Return the images of all splits as declared or known; 0 if they are neither."""
        images = self.expected_counts.images or {}
        return sum(images.get(split) or 0 for split in self.splits)


def open_data_set(cfg: ConvertConfig) -> "dict[str, FolderSource]":
    """Return the splits of a data set that is not built in; its folders are listed once.

    Raises:
        SourceError, ValueError: as in a run.
    """
    found = list_data_set(cfg)
    if isinstance(found, ValueError):
        raise found
    return found


# Several runs of a reproduction ask for one data set. `cache` keeps no exception, but listing a
# wrong data set takes as long as listing a right one: so the error is returned, not raised.
@cache
def list_data_set(cfg: ConvertConfig) -> "dict[str, FolderSource] | ValueError":
    """Return the splits, or what is wrong with them."""
    try:
        return open_splits(Path(), cfg)
    except ValueError as error:
        return error


def count_images(cfg: ConvertConfig, *, listed: bool) -> dict[str, int]:
    """Return the images of each split: those found, with `listed`, or else as declared or known.

    A split is left out if its number is not known before a run.
    """
    declared = {
        split: count for split, count in (cfg.expected_counts.images or {}).items() if count
    }
    if not listed or cfg.train_dir in BUILTIN:
        return declared
    try:
        return {split: len(source) for split, source in open_data_set(cfg).items()}
    except (ValueError, OSError):
        # The check of the data set itself reports what is wrong with it.
        return declared


def count_train_images(inputs: Mapping[str, StageConfig]) -> int | None:
    """Return the number of training images as declared or known for the data set, else None."""
    data = inputs.get("data")
    if not isinstance(data, ConvertConfig):
        return None
    return (data.expected_counts.images or {}).get("train")


def check_labeled(inputs: Mapping[str, StageConfig]) -> None:
    """Raise ValueError if the data set has no labels or no validation images, as far as is said."""
    data = inputs.get("data")
    if not isinstance(data, ConvertConfig):
        return
    for missing, count in (
        ("labels", data.num_classes),
        ("validation images", data.num_val_images),
    ):
        if count == 0:
            raise ValueError(f"data: data set {data.dataset!r} has no {missing}, which it needs")


def open_splits(run_dir: Path, cfg: ConvertConfig) -> "dict[str, FolderSource]":
    """Return the images of each split, with their layout checked.

    Raises:
        SourceError: names everything that is wrong with any of them.
    """
    for name in ("root", *(f"{split}_dir" for split in cfg.splits)):
        if getattr(cfg, name) is None:
            raise ValueError(f"{name} is not set")
    # After that, since a plan without data sets does without NumPy.
    from mugs.data.sources.base import SourceError
    from mugs.data.sources.cifar import ArraySource
    from mugs.data.sources.expected import (
        check_allowed_exist,
        check_expected_counts,
        check_names_are_text,
    )
    from mugs.data.sources.listing import open_images
    from mugs.data.sources.public import open_public
    from mugs.data.sources.scan import scan_folder

    good: dict[str, FolderSource] = {}
    bad: dict[str, SourceError] = {}
    for split in cfg.splits:
        listed = getattr(cfg, f"{split}_list")
        try:
            if cfg.root:
                source = open_public(cfg.dataset, expand_home(cfg.root), split)
                if isinstance(source, ArraySource) and cfg.storage == "original":
                    source.use_png()
                good[split] = source
                continue
            if packed := find_packed(cfg, split):
                good[split] = packed
                continue
            folder = find_image_folder(getattr(cfg, f"{split}_dir"), split, run_dir)
            list_file = None if listed is None else expand_home(listed)
            # Images that come with the program are written by each run.
            memory = None if run_dir in folder.parents else scan_folder()
            good[split] = open_images(
                folder, list_file, labeled=cfg.num_classes != 0, memory=memory
            )
        except SourceError as error:
            # Both splits are checked before anything is reported: one look shows all problems.
            bad[split] = error
    check_names_are_text(good)
    check_expected_counts(cfg.dataset, {**good, **bad}, cfg.expected_counts)
    check_allowed_exist(good, cfg.allow_bad)
    return good


def find_packed(cfg: ConvertConfig, split: str) -> "FolderSource | None":
    """Return the images of a split if they lie in tar or parquet files, else None.

    Raises SourceError naming what is wrong with them.
    """
    from mugs.data.sources.base import SourceError
    from mugs.data.sources.packed import is_packed, open_packed
    from mugs.data.sources.scan import scan_folder
    from mugs.engine.progress import Progress

    place = getattr(cfg, f"{split}_dir")
    path = Path(place).expanduser()
    labels = getattr(cfg, f"{split}_labels")
    if place in BUILTIN or not is_packed(path):
        if labels is not None:
            raise SourceError(f"{split}_labels is for tar files, and {split}_dir is {place}")
        return None
    if getattr(cfg, f"{split}_list") is not None or cfg.num_classes == 0:
        raise SourceError(f"{path}: {split}_list and num_classes: 0 need a folder of images")
    label_file = Path(labels).expanduser() if labels else None
    # A bar on a terminal, lines in a log: going through 138 GB takes minutes, the first time.
    with closing(Progress(f"list {split} images", 1, unit="MB", rate_unit="MB/s")) as progress:

        def report(done: int, total: int) -> None:
            progress.total = max(1, total // 10**6)
            progress.update(done // 10**6, items=done // 10**6 - progress.done)

        return open_packed(path, label_file, scan_folder(), report)


def find_image_folder(folder: str, split: str, run_dir: Path) -> Path:
    """Return the folder to convert; built-in images are first written below the run's folder."""
    from mugs.data.sources.base import SourceError

    if folder in BUILTIN:
        images = run_dir / "images"
        runfile.import_by_name(BUILTIN[folder])(images)
        return images / split
    if folder.startswith("builtin:"):
        raise ValueError(f"{split}_dir: there is no {folder} (valid: {', '.join(BUILTIN)})")
    path = expand_home(folder)
    if not path.is_dir():
        raise SourceError(f"{split}_dir: {path} is not a folder")
    return path
