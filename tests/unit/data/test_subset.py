"""Labelled parts: lists of the ImageNet layout with their off-by-one,
and parts drawn class by class.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from mugs.data.sources.base import SourceError
from mugs.data.sources.subset import Subset, draw_class_balanced, indices_from_list
from pipeline.reading import validate_model
from pipeline.spec import ConfigError
from stages.shared.labelled import LabelledPart

PER_CLASS = 130  # the shape of ImageNet's training split, a tenth of its size


@dataclass
class Named:
    """A source of made-up file names; no image is ever read."""

    names: list[str]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        return self.names[index].encode()

    def label(self, index: int) -> int:
        return self.classes.index(self.names[index].split("/")[0])

    def name(self, index: int) -> str:
        return self.names[index]

    def describe(self, index: int) -> str:
        return self.names[index]


class Imagenet(Named):
    """1,000 classes of `PER_CLASS` images, named as ImageNet names them."""

    def __init__(self) -> None:
        classes = [f"n{c:08d}" for c in range(1000)]
        super().__init__([f"{c}/{c}_{i}.JPEG" for c in classes for i in range(PER_CLASS)], classes)

    def label(self, index: int) -> int:
        return index // PER_CLASS


@pytest.fixture(scope="module")
def imagenet() -> Imagenet:
    return Imagenet()


def file_names(source: Imagenet, count: int) -> list[str]:
    """`count` file names without folders, the last one of class 0."""
    order = [i * PER_CLASS + k for k in range(PER_CLASS) for i in range(1000)]
    return [source.names[i].split("/")[1] for i in order[:count]][::-1]


def write(folder: Path, text: str) -> Path:
    path = folder / "list.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("percent", "lines", "end"),
    [
        (1.0, 12_811, "\n"),
        (1.0, 12_811, ""),
        (1.0, 12_811, "\nn"),
        (1.0, 12_811, "n"),
        (1.0, 12_811, "\r\n\n"),
        (10.0, 128_116, "\nn"),
    ],
)
def test_lists_of_the_imagenet_layout(
    imagenet: Imagenet, tmp_path: Path, percent: float, lines: int, end: str
) -> None:
    path = write(tmp_path, "\n".join(file_names(imagenet, lines)) + end)
    kept = LabelledPart(percent=percent, list_file=str(path)).select_images(imagenet, "imagenet1k")
    assert len(kept) == lines and kept.indices == sorted(set(kept.indices))
    dropped = LabelledPart(percent=percent, list_file=str(path), last_line="dropped").select_images(
        imagenet, "imagenet1k"
    )
    assert [imagenet.name(i) for i in set(kept.indices) - set(dropped.indices)] == [
        "n00000000/n00000000_0.JPEG"
    ]
    assert len(dropped) == lines - 1


def test_a_list_of_another_length_is_refused(imagenet: Imagenet, tmp_path: Path) -> None:
    part = LabelledPart(
        percent=1, list_file=str(write(tmp_path, "\n".join(file_names(imagenet, 12_810))))
    )
    with pytest.raises(SourceError, match=r"list\.txt: names 12810 images, 12811 expected.*simclr"):
        part.select_images(imagenet, "imagenet1k")
    assert len(part.select_images(imagenet, "my_images")) == 12_810


def test_another_content_is_refused(imagenet: Imagenet, tmp_path: Path) -> None:
    path = write(tmp_path, "\n".join(file_names(imagenet, 2000)))
    with pytest.raises(SourceError, match=r"SHA-256 [0-9a-f]{64}, list_sha256 says 0000"):
        LabelledPart(percent=5, list_file=str(path), list_sha256="0" * 64).select_images(
            imagenet, "x"
        )


SMALL = Named(["cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "dog/c.jpg"], ["cat", "dog"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("b.jpg\nz.jpg\nc.jpg\n", "1 of its lines name no image of the data set: z.jpg"),
        (
            "b.jpg\nc.jpg\na.jpg\n",
            "1 of its lines are the name of several images; give paths: a.jpg",
        ),
        ("b.jpg\nc.jpg\ncat/b.jpg\n", "1 of its lines name an image again: cat/b.jpg"),
        ("b.jpg\nc.jpg\nxyz", "1 of its lines name no image of the data set: xyz"),
        ("b.jpg\nn", "1 of 2 classes have no image in it: dog"),
        ("\n\n", "names no file"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SourceError, match=f"list.txt: {words}"):
        indices_from_list(SMALL, write(tmp_path, text))


def test_paths_and_names_may_be_mixed(tmp_path: Path) -> None:
    assert indices_from_list(SMALL, write(tmp_path, "dog/a.jpg\nb.jpg\n./cat/a.jpg\n")) == [0, 1, 2]
    with pytest.raises(SourceError, match=r"no\.txt: cannot be read as a list"):
        indices_from_list(SMALL, tmp_path / "no.txt")


def test_a_balanced_part_takes_its_share_of_each_class(imagenet: Imagenet) -> None:
    small, large = (draw_class_balanced(imagenet, percent, seed=0) for percent in (1, 10))
    assert [len(small), len(large)] == [1000, 13_000]  # 1.3 and 13 of 130 images
    assert {imagenet.label(i) for i in small} == set(range(1000)) and set(small) < set(large)
    assert (
        draw_class_balanced(imagenet, 1, seed=0)
        == small
        != draw_class_balanced(imagenet, 1, seed=1)
    )
    within = [i % PER_CLASS for i in small]
    assert len(set(within)) > 100  # not the same image of every class


def test_a_class_keeps_at_least_one_image() -> None:
    assert len(draw_class_balanced(SMALL, 1, seed=3)) == 2


def test_a_subset_is_a_source() -> None:
    part = Subset(SMALL, [3, 0])
    assert [part.name(i) for i in range(len(part))] == ["dog/c.jpg", "cat/a.jpg"]
    assert (part.label(0), part.read(1), part.describe(0)) == (1, b"cat/a.jpg", "dog/c.jpg")
    assert part.classes == ["cat", "dog"] and part.fingerprint != Subset(SMALL, [0, 3]).fingerprint


def test_a_balanced_part_needs_no_list() -> None:
    assert LabelledPart(percent=1, by="class_balanced").list_file == ""
    assert LabelledPart(percent=1).list_file is None
    with pytest.raises(ConfigError):
        validate_model(LabelledPart, {"percent": 0}, "x.yaml")
