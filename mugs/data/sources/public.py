"""Public data sets in the layout in which they are downloaded.

cifar10, cifar100   cifar-10-batches-py/, cifar-100-python/ (the Python version)
inat18, inat19      train2018.json, val2018.json and the images they name, train_val2018/...
flowers102          jpg/image_00001.jpg ..., imagelabels.mat, setid.mat; train and validation images
                    are the training set
cars                cars_train/, cars_test/, devkit/cars_train_annos.mat, devkit/cars_meta.mat, and
                    cars_test_annos_withlabels.mat in devkit/ or beside it
"""

import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mugs.data.sources.base import SourceError, find_repeated, raise_if_any
from mugs.data.sources.cifar import open_cifar
from mugs.data.sources.listing import LONGEST_LIST, ListedSource, is_file_below
from pipeline.files import read_bounded

Opener = Callable[[Path, str], ListedSource]


def open_public(dataset: str, root: Path, split: str) -> ListedSource:
    """Return the "train" or "val" images of a data set. Raises SourceError naming a wrong file."""
    if not root.is_dir():
        raise SourceError(f"{root}: not a folder")
    return PUBLIC[dataset](root, split)


def open_inat(root: Path, split: str, *, year: int) -> ListedSource:
    """Open iNaturalist, with species in the order of their category numbers."""
    # The release numbers species as they first appear in a file.
    path = root / f"{split}{year}.json"
    content = read_dataset_json(path)
    try:
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        category = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
        # A dict keeps the last of several entries, and the others would be lost unnoticed.
        for what, ids in (
            ("images", [image["id"] for image in content["images"]]),
            ("images of annotations", [entry["image_id"] for entry in content["annotations"]]),
        ):
            raise_if_any(path, f"{what} are listed again, by id", find_repeated(ids))
        # The split files of 2018 do not list the species.
        listing = "categories.json" if year == 2018 else f"categories{year}.json"
        species = content.get("categories") or read_dataset_json(root / listing)
        names = {entry["id"]: str(entry["name"]) for entry in species}
        sorted(names)  # they have to be of one kind
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}: not an iNaturalist file ({error!r})") from error
    raise_if_any(
        path,
        "categories are listed again, by id",
        find_repeated(entry["id"] for entry in species),
    )
    lost = [str(image) for image in category if image not in files]
    raise_if_any(path, "annotations are of images that are not listed", lost)
    numbers = {identity: number for number, identity in enumerate(sorted(names))}
    unlabeled = [files[image] for image in files if category.get(image) not in numbers]
    raise_if_any(path, "images have no category, or one that is not listed", unlabeled)
    labels = [numbers[category[image]] for image in files]
    # The number is part of the class name, as names need not be unique.
    classes = [f"{identity} {names[identity]}" for identity in sorted(names)]
    return make_checked_source(root, path, list(files.values()), labels, classes)


def open_flowers(root: Path, split: str) -> ListedSource:
    """Open Flowers-102: 2,040 training images (its train and validation sets), 6,149 of test."""
    labels = read_mat(root / "imagelabels.mat", "labels")
    parts = ("trnid", "valid") if split == "train" else ("tstid",)
    chosen = np.concatenate([read_mat(root / "setid.mat", part) for part in parts]).tolist()
    beyond = [str(number) for number in chosen if not 1 <= number <= len(labels)]
    raise_if_any(
        root / "setid.mat", f"numbers are not those of the {len(labels)} labeled images", beyond
    )
    return make_one_based_source(
        root,
        root / "imagelabels.mat",
        [f"jpg/image_{number:05d}.jpg" for number in chosen],
        [labels[number - 1] for number in chosen],
        # The files do not name the flowers.
        [str(number) for number in range(1, 103)],
    )


def open_cars(root: Path, split: str) -> ListedSource:
    """Open Stanford Cars; classes 1 to 196 of the annotations become 0 to 195."""
    # The release takes the number of classes from a field of the bounding boxes instead (E10).
    folder = "cars_train" if split == "train" else "cars_test"
    name = "cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
    path = root / "devkit" / name
    path = path if path.is_file() else root / name
    if split == "val" and not path.is_file():
        raise SourceError(
            f"{root}: {name} is neither in devkit nor beside it; "
            "cars_test_annos.mat, which comes with the images, has no labels"
        )
    entries = read_mat(path, "annotations")
    if not {"class", "fname"} <= set(entries.dtype.names or ()):
        raise SourceError(f"{path}: its annotations have no field 'class' or 'fname'")
    classes = read_mat(root / "devkit" / "cars_meta.mat", "class_names")
    return make_one_based_source(
        root,
        path,
        [f"{folder}/{name}" for name in entries["fname"]],
        list(entries["class"]),
        [str(name) for name in classes],
    )


def make_one_based_source(
    root: Path, where: Path, paths: list[str], labels: Sequence[Any], classes: list[str]
) -> ListedSource:
    """Return the images as a source, with labels that count from 1 in the file `where`."""
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
    """Return the images as a source.

    Raises SourceError if a file or a class is missing, or a file is named again.
    """
    raise_if_any(where, "images are named again", find_repeated(paths))
    missing = [path for path in paths if not is_file_below(root, path)]
    raise_if_any(where, f"named images are not below {root}", missing)
    empty = [classes[number] for number in sorted(set(range(len(classes))) - set(labels))]
    raise_if_any(where, "classes have no image", empty)
    return ListedSource(root, paths, labels, classes)


def read_dataset_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises SourceError naming it."""
    try:
        return json.loads(read_bounded(path, LONGEST_LIST))
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not readable as JSON: {error}") from error


def read_mat(path: Path, name: str) -> np.ndarray:
    """Return a variable of a MATLAB file; a single value has the shape (1,).

    Raises SourceError naming the file.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    try:
        content = loadmat(io.BytesIO(read_bounded(path)), squeeze_me=True)
    except Exception as error:
        # Damaged files make scipy raise whatever it is; it does not read files of MATLAB 7.3.
        raise SourceError(f"{path}: not readable as a MATLAB file: {error}") from error
    if name not in content:
        raise SourceError(f"{path}: no variable {name!r} in it")
    return np.atleast_1d(content[name])


PUBLIC: dict[str, Opener] = {
    "cifar10": partial(
        open_cifar,
        folder="cifar-10-batches-py",
        files={"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]},
        labels="labels",
        classes=("batches.meta", "label_names"),
    ),
    # With the 100 fine labels.
    "cifar100": partial(
        open_cifar,
        folder="cifar-100-python",
        files={"train": ["train"], "val": ["test"]},
        labels="fine_labels",
        classes=("meta", "fine_label_names"),
    ),
    "inat18": partial(open_inat, year=2018),
    "inat19": partial(open_inat, year=2019),
    "flowers102": open_flowers,
    "cars": open_cars,
}
