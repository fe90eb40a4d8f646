"""Check that image folders hold the data set they should hold, before anything is converted."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mugs.data.sources.base import SourceError, format_names, is_encodable, raise_if_any

if TYPE_CHECKING:
    # Planning reads the counts below, and does without NumPy.
    from mugs.data.sources.folder import FolderSource


@dataclass(frozen=True)
class ExpectedCounts:
    """Number of classes, and of images by split; None is not checked."""

    classes: int | None = None
    images: Mapping[str, int | None] | None = None

    def or_known(self, dataset: str) -> "ExpectedCounts":
        """Return these counts; what is None comes from the data set of that name if it is known."""
        known = KNOWN.get(dataset, ExpectedCounts())
        # What the configuration states counts more than what is known.
        given = {split: num for split, num in (self.images or {}).items() if num is not None}
        classes = known.classes if self.classes is None else self.classes
        return ExpectedCounts(classes, {**(known.images or {}), **given})


# As published. The training images of Flowers-102 are its training and validation images.
KNOWN = {
    "imagenet1k": ExpectedCounts(1000, {"train": 1_281_167, "val": 50_000}),
    "cifar10": ExpectedCounts(10, {"train": 50_000, "val": 10_000}),
    "cifar100": ExpectedCounts(100, {"train": 50_000, "val": 10_000}),
    "inat18": ExpectedCounts(8142, {"train": 437_513, "val": 24_426}),
    "inat19": ExpectedCounts(1010, {"train": 265_213, "val": 3_030}),
    "flowers102": ExpectedCounts(102, {"train": 2_040, "val": 6_149}),
    "cars": ExpectedCounts(196, {"train": 8_144, "val": 8_041}),
    "coco2017": ExpectedCounts(80, {"train": 118_287, "val": 5_000}),
}


def check_expected_counts(
    dataset: str, sources: "Mapping[str, FolderSource | SourceError]", expected: ExpectedCounts
) -> None:
    """Raise SourceError, in one line, with all that differs in any split.

    A split whose images cannot be opened is given by its error.
    """
    problems = [
        difference
        for split, source in sources.items()
        for difference in _count_differences(split, source, expected)
    ]
    train = sources.get("train")
    val = sources.get("val")
    if train and val and not isinstance(train, SourceError) and not isinstance(val, SourceError):
        # Labels are positions in the sorted class names, so both splits must have the same.
        problems += _class_differences(train.classes, val.classes)
    for split, opened in sources.items():
        if not isinstance(opened, SourceError):
            problems += _find_doubled_names(split, opened.classes)
    if problems:
        raise SourceError(
            f"data set {dataset} is not as expected, nothing was converted: {'; '.join(problems)}"
        )


def check_names_are_text(sources: "Mapping[str, FolderSource]") -> None:
    """Raise SourceError for names that are not UTF-8, which no sidecar can hold."""
    for split, source in sources.items():
        if source.has_only_text_names():
            continue
        wrong = [name for name in (*source.classes, *source.paths) if not is_encodable(name)]
        raise_if_any(
            f"{split} ({source.root})",
            "names of files or folders are not UTF-8 (rename them, for example with convmv)",
            [
                name.encode(errors="surrogateescape").decode(errors="backslashreplace")
                for name in wrong
            ],
        )


def check_allowed_exist(sources: "Mapping[str, FolderSource]", allow_bad: Sequence[str]) -> None:
    """Raise SourceError for names in `allow_bad` that are no image of any split."""
    found = {path for source in sources.values() for path in source.paths} if allow_bad else set()
    raise_if_any(
        "allow_bad",
        f"of its names are no image of {', '.join(sources)} (a name is <class>/<file>)",
        [name for name in allow_bad if name not in found],
    )


def _count_differences(
    split: str, source: "FolderSource | SourceError", expected: ExpectedCounts
) -> list[str]:
    if isinstance(source, SourceError):
        return [f"{split}: {source}"]
    lines = [
        f"{found} {what} found, {wanted} expected"
        for what, found, wanted in (
            ("classes", len(source.classes), expected.classes),
            ("images", len(source), (expected.images or {}).get(split)),
        )
        if wanted not in (None, found)
    ]
    return [f"{split} ({source.root}): {', '.join(lines)}"] if lines else []


def _compose(names: Sequence[str]) -> list[str]:
    return [unicodedata.normalize("NFC", name) for name in names]


def _find_doubled_names(split: str, classes: Sequence[str]) -> list[str]:
    again = [name for name, count in Counter(_compose(classes)).items() if count > 1]
    if not again:
        return []
    return [
        f"{split}: {len(again)} classes have two folders, whose names differ only in how Unicode "
        f"composes their letters: {format_names(again)}; merge them"
    ]


def _class_differences(train: list[str], val: list[str]) -> list[str]:
    if train != val and sorted(_compose(train)) == sorted(_compose(val)):
        return [
            "classes of train and val differ only in how Unicode composes the letters of their "
            "names, as after a copy from macOS; rename those of one of them (convmv --nfc)"
        ]
    return [
        f"{len(names)} classes of {one} are not in {other}: {format_names(sorted(names))}"
        for one, other, names in (
            ("train", "val", set(train) - set(val)),
            ("val", "train", set(val) - set(train)),
        )
        if names
    ]
