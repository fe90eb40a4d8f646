"""Classes of images that come without class folders: from numbers, names, or a file of labels."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mugs.data.sources.base import SourceError, format_names, raise_if_any
from mugs.data.sources.listing import read_lines

# Of the development kit of ILSVRC2012: numbers of classes, and what they mean.
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
# ImageNet's names: `n01440764_10026.JPEG`; the Hub adds the class to each.
SYNSET_AT_END = re.compile(r"(.+)_(n\d{8})(\.\w+)")
SYNSET_AT_BEGIN = re.compile(r"(n\d{8})_.+")


def name_classes(names: Sequence[str], labels: Sequence[int]) -> tuple[list[str], list[str]]:
    """Return the class names, in the order of the labels, and the path `class/file` of each image.

    A class is named by the folder of its images, or the synset in their names, if each label has
    one of its own; otherwise by its number. Raises SourceError if a number between has no image.
    """
    empty = sorted(set(range(max(labels) + 1)) - set(labels))
    if empty:
        numbers = format_names([str(number) for number in empty])
        raise SourceError(f"labels go up to {max(labels)}, but no image has label {numbers}")
    for split in (_split_folder, _split_synset):
        parts = [split(name) for name in names]
        if all(parts) and (classes := _match([part[0] for part in parts if part], labels)):
            return classes, [f"{part[0]}/{part[1]}" for part in parts if part]
    width = len(str(max(labels)))
    classes = [f"{number:0{width}d}" for number in range(max(labels) + 1)]
    return classes, [f"{classes[k]}/{name}" for name, k in zip(names, labels, strict=True)]


def _split_folder(name: str) -> tuple[str, str] | None:
    folder, slash, rest = name.partition("/")
    return (folder, rest) if slash else None


def _split_synset(name: str) -> tuple[str, str] | None:
    if found := SYNSET_AT_END.fullmatch(name):
        return found[2], f"{found[1]}{found[3]}"
    found = SYNSET_AT_BEGIN.fullmatch(name)
    return (found[1], name) if found else None


def _match(classes: Sequence[str], labels: Sequence[int]) -> list[str]:
    """Return the class of each label; [] unless they are sorted as the labels are, one for each."""
    pairs = sorted(set(zip(labels, classes, strict=True)))
    found = [name for _, name in pairs]
    fits = [label for label, _ in pairs] == list(range(len(pairs))) and found == sorted(set(found))
    return found if fits else []


def read_classes(source: Path, names: Sequence[str]) -> list[str]:
    """Return the class of each image, given by file name, from a file of labels.

    A line is `name class`; or a class alone, for the images in the order of their names. The
    numbers of ImageNet's development kit, whose folder may be given, mean what its meta.mat says.

    Raises SourceError if lines are missing, or too many.
    """
    path = source
    if source.is_dir():
        places = [source / GROUND_TRUTH, source / "data" / GROUND_TRUTH]
        path = next((place for place in places if place.is_file()), places[0])
    lines = [line.rsplit(maxsplit=1) for line in read_lines(path)]
    if all(len(line) == 1 for line in lines):
        if len(lines) != len(names):
            raise SourceError(f"{path}: has {len(lines)} lines for {len(names)} images")
        classes = _translate(path, [line[0] for line in lines])
        position = {name: number for number, name in enumerate(sorted(names))}
        return [classes[position[name]] for name in names]
    raise_if_any(
        path, "of its lines carry no label, others do", [line[0] for line in lines if len(line) < 2]
    )
    known = {PurePosixPath(name).name: label for name, label in lines}
    if len(known) != len(lines):
        raise SourceError(f"{path}: names an image again")
    raise_if_any(path, "images have no line in it", [name for name in names if name not in known])
    raise_if_any(path, "of its lines name no image", sorted(set(known) - set(names)))
    return [known[name] for name in names]


def _translate(path: Path, classes: list[str]) -> list[str]:
    """Return classes with ImageNet's numbers, 1 to 1000, as its synsets."""
    if not all(name.isdecimal() for name in classes):
        return classes
    from mugs.data.sources.public import read_mat

    meta = path.with_name(META)
    if not meta.is_file():
        raise SourceError(f"{path}: holds numbers; put {META} of the development kit beside it")
    synsets = read_mat(meta, "synsets")
    if not {"ILSVRC2012_ID", "WNID"} <= set(synsets.dtype.names or ()):
        raise SourceError(f"{meta}: no fields ILSVRC2012_ID and WNID in it")
    meaning = {
        int(number): str(name)
        for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
    }
    lost = sorted({name for name in classes if int(name) not in meaning})
    raise_if_any(path, f"of its numbers are not in {META}", lost)
    return [meaning[int(name)] for name in classes]
