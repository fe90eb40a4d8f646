"""Public data sets in the layout in which they are downloaded.

cifar10, cifar100   cifar-10-batches-py/, cifar-100-python/ (the Python version)
inat18, inat19      train2018.json, val2018.json and the images they name, train_val2018/...
flowers102          jpg/image_00001.jpg ..., imagelabels.mat, setid.mat; train and validation images train
cars                cars_train/, cars_test/, devkit/cars_train_annos.mat, devkit/cars_meta.mat, and
                    cars_test_annos_withlabels.mat in devkit/ or beside it
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mugs.data.sources.base import SourceError, raise_if_any
from mugs.data.sources.cifar import open_cifar10, open_cifar100
from mugs.data.sources.listing import ListedSource

Opener = Callable[[Path, str], ListedSource]


def open_public(dataset: str, root: Path, split: str) -> ListedSource:
    """The "train" or "val" images of a public data set. Raises SourceError saying which file is wrong, and how."""
    if not root.is_dir():
        raise SourceError(f"{root}: not a folder")
    return PUBLIC[dataset](root, split)


def open_inat(root: Path, split: str, *, year: int) -> ListedSource:
    """iNaturalist: species by their category number. (The release numbers them as they first appear.)"""
    path = root / f"{split}{year}.json"
    content = read_dataset_json(path)
    try:
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        category = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
        names = {
            entry["id"]: str(entry["name"])
            for entry in content.get("categories") or read_categories(root, year)
        }
    except (KeyError, TypeError) as error:
        raise SourceError(f"{path}: not an iNaturalist file ({error!r})") from error
    numbers = {identity: number for number, identity in enumerate(sorted(names))}
    unlabelled = [files[image] for image in files if category.get(image) not in numbers]
    raise_if_any(path, "images have no category, or one that is not listed", unlabelled)
    classes = [f"{identity} {names[identity]}" for identity in sorted(names)]
    return make_checked_source(
        root, path, list(files.values()), [numbers[category[image]] for image in files], classes
    )


def read_categories(root: Path, year: int) -> Any:
    """The species of the 2018 data set, when its split files do not list them."""
    return read_dataset_json(
        root / f"categories{year}.json" if year != 2018 else root / "categories.json"
    )


def open_flowers(root: Path, split: str) -> ListedSource:
    """Flowers-102: 2,040 training images (train and validation of the data set), 6,149 test images."""
    labels = np.atleast_1d(read_mat(root / "imagelabels.mat", "labels"))
    parts = ("trnid", "valid") if split == "train" else ("tstid",)
    chosen = np.concatenate(
        [np.atleast_1d(read_mat(root / "setid.mat", part)) for part in parts]
    ).tolist()
    beyond = [str(number) for number in chosen if not 1 <= number <= len(labels)]
    raise_if_any(
        root / "setid.mat", f"numbers are not those of the {len(labels)} labelled images", beyond
    )
    paths = [f"jpg/image_{number:05d}.jpg" for number in chosen]
    return make_one_based_source(
        root, root / "imagelabels.mat", paths, [labels[n - 1] for n in chosen], _numbers(102)
    )


def open_cars(root: Path, split: str) -> ListedSource:
    """Stanford Cars: classes 1 to 196 of the annotations become 0 to 195. (Row E10: the release counts box edges.)"""
    folder, name = "cars_train", "cars_train_annos.mat"
    if split == "val":
        folder, name = "cars_test", "cars_test_annos_withlabels.mat"
    path = root / "devkit" / name
    path = path if path.is_file() else root / name
    if split == "val" and not path.is_file():
        found = f"{root}: {name} is neither in devkit nor beside it"
        raise SourceError(
            f"{found}; cars_test_annos.mat, which comes with the images, has no labels"
        )
    entries = np.atleast_1d(read_mat(path, "annotations"))
    if not {"class", "fname"} <= set(entries.dtype.names or ()):
        raise SourceError(f"{path}: its annotations have no field 'class' or 'fname'")
    classes = [
        str(name)
        for name in np.atleast_1d(read_mat(root / "devkit" / "cars_meta.mat", "class_names"))
    ]
    paths = [f"{folder}/{name}" for name in entries["fname"]]
    return make_one_based_source(root, path, paths, list(entries["class"]), classes)


def make_one_based_source(
    root: Path, where: Path, paths: list[str], labels: Sequence[Any], classes: list[str]
) -> ListedSource:
    """Images with labels that count from 1."""
    wrong = [
        f"{path} ({label})"
        for path, label in zip(paths, labels, strict=True)
        if not 1 <= label <= len(classes)
    ]
    raise_if_any(where, f"labels are not 1 to {len(classes)}", wrong)
    return make_checked_source(root, where, paths, [int(label) - 1 for label in labels], classes)


def make_checked_source(
    root: Path, where: Path, paths: list[str], labels: list[int], classes: list[str]
) -> ListedSource:
    """The images, all of which are there, and of every class."""
    raise_if_any(
        where,
        f"named images are not below {root}",
        [path for path in paths if not (root / path).is_file()],
    )
    present = set(labels)
    raise_if_any(
        where,
        "classes have no image",
        [name for number, name in enumerate(classes) if number not in present],
    )
    return ListedSource(root, paths, labels, classes)


def read_dataset_json(path: Path) -> Any:
    """Content of a JSON file. Raises SourceError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: not readable as JSON: {error}") from error


def read_mat(path: Path, name: str) -> np.ndarray:
    """A variable of a MATLAB file. Raises SourceError naming the file."""
    from scipy.io import loadmat

    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    try:
        content = loadmat(path, squeeze_me=True)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise SourceError(f"{path}: not readable as a MATLAB file: {error}") from error
    if name not in content:
        raise SourceError(f"{path}: no variable {name!r} in it")
    found: np.ndarray = content[name]
    return found


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(1, count + 1)]


PUBLIC: dict[str, Opener] = {
    "cifar10": open_cifar10,
    "cifar100": open_cifar100,
    "inat18": partial(open_inat, year=2018),
    "inat19": partial(open_inat, year=2019),
    "flowers102": open_flowers,
    "cars": open_cars,
}
