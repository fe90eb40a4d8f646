"""Reading and checking COCO: what counts as an object, outlines, and errors that name the file."""

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_cases import SQUARE, entry, write_coco
from PIL import Image
from pycocotools import mask as rle

from mugs.data.dense.coco import CocoSplit, check_coco, decode_outline, trainable_indices
from mugs.data.mini.coco import materialize_coco
from mugs.data.sources.base import SourceError
from mugs.data.sources.decode import DecodeError
from mugs.data.sources.expected import KNOWN, ExpectedCounts
from stages.coco_data import CocoDataConfig
from stages.shared.external_data import check_external_data


def test_classes_boxes_and_masks(tmp_path: Path) -> None:
    annotations = [entry(1, 1), entry(2, 2, category_id=3, bbox=[30.0, 50.0, 20.0, 20.0])]
    split = CocoSplit(write_coco(tmp_path, annotations), "train")
    assert (split.categories, split.names[3]) == ([3, 7], "three")
    boxes, labels, masks = split.objects(0)
    assert (boxes.tolist(), labels.tolist()) == ([[10, 10, 30, 30]], [1])
    assert masks.shape == (1, 40, 60) and masks.sum() == 400 and masks[0, 10:30, 10:30].all()
    boxes, labels, _ = split.objects(1)
    assert (boxes.tolist(), labels.tolist()) == (
        [[30, 50, 40, 60]],
        [0],
    )  # cut at the 40 x 60 image


@pytest.mark.parametrize(
    "fields",
    [
        {"iscrowd": 1, "segmentation": {"size": [40, 60], "counts": [2400]}},
        {"ignore": 1},
        {"area": 0.0},
        {"bbox": [10.0, 10.0, 0.5, 20.0]},
        {"bbox": [10.0, 10.0, 20.0, 0.9]},
        {"bbox": [60.0, 10.0, 20.0, 20.0]},
        {"bbox": [-30.0, -30.0, 20.0, 20.0]},
    ],
)
def test_what_does_not_count(tmp_path: Path, fields: dict[str, Any]) -> None:
    """An image of which nothing is left is trained on as background."""
    split = CocoSplit(write_coco(tmp_path, [entry(1, 1, **fields), entry(2, 2)]), "train")
    assert [len(image.objects) for image in split.images] == [0, 1]
    boxes, labels, masks = split.objects(0)
    assert (boxes.shape, labels.shape, masks.shape) == ((0, 4), (0,), (0, 40, 60))
    assert trainable_indices(split, 32) == [0, 1] and split.num_uncounted == 1


def test_a_box_of_one_pixel_counts(tmp_path: Path) -> None:
    dot = entry(
        1, 1, bbox=[5.0, 6.0, 1.0, 1.0], area=1.0, segmentation=[[5.0, 6, 6, 6, 6, 7, 5, 7]]
    )
    split = CocoSplit(write_coco(tmp_path, [dot]), "train")
    boxes, _, masks = split.objects(0)
    assert boxes.tolist() == [[5, 6, 6, 7]] and masks[0].nonzero().tolist() == [[6, 5]]


def test_small_images_and_those_without_annotations_are_not_trained_on(tmp_path: Path) -> None:
    sizes = {1: (31, 200), 2: (32, 200), 3: (200, 31)}
    split = CocoSplit(
        write_coco(
            tmp_path,
            [entry(n, n, bbox=[1.0, 1, 20, 20]) for n in sizes],
            sizes=sizes | {4: (50, 50)},
        ),
        "train",
    )
    assert trainable_indices(split, 32) == [1]


def test_polygons_outside_the_image_are_cut() -> None:
    """The part within the image, against a count of pixel centers inside the square."""
    found = decode_outline([[-10.0, -5, 8, -5, 8, 12, -10, 12]], 40, 60)
    expected = np.zeros((40, 60), np.uint8)
    expected[:12, :8] = 1
    assert np.array_equal(found, expected)
    assert not decode_outline([[100.0, 100, 120, 100, 120, 120]], 40, 60).any()


def test_several_polygons_are_one_object_and_lines_enclose_nothing() -> None:
    other = [40.0, 10, 50, 10, 50, 20, 40, 20]
    both = decode_outline([SQUARE, other, [1.0, 1, 5, 5]], 40, 60)
    assert both.sum() == 400 + 100
    assert (
        not decode_outline([[1.0, 1, 5, 5]], 40, 60).any() and not decode_outline([], 40, 60).any()
    )


def test_run_length_codes_of_both_kinds() -> None:
    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[3:9, 4:20] = 1
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    counts = np.diff([0, *edges, flat.size]).tolist()
    assert np.array_equal(decode_outline({"size": [40, 60], "counts": counts}, 40, 60), mask)
    assert np.array_equal(decode_outline(rle.encode(mask), 40, 60), mask)
    with pytest.raises(ValueError, match="40 x 60 pixels, its image 60 x 40"):
        decode_outline({"size": [60, 40], "counts": [2400]}, 40, 60)


@pytest.mark.parametrize(
    "outline", [[[1.0, 2, 3, 4, 5, 6, 7]], {"size": [40, 60]}, 5, "polygon", {"counts": "x"}]
)
def test_bad_outlines_name_file_and_annotation(tmp_path: Path, outline: object) -> None:
    split = CocoSplit(write_coco(tmp_path, [entry(12, 1, segmentation=outline)]), "val")
    with pytest.raises(
        SourceError, match=r"instances_val2017.json: annotation 12 of 000000000001.jpg"
    ):
        split.objects(0)


def test_bad_images_are_named(tmp_path: Path) -> None:
    root = write_coco(tmp_path, [entry(1, 1)])
    split = CocoSplit(root, "train")
    path = root / "train2017" / "000000000001.jpg"
    Image.new("RGB", (60, 41)).save(path)
    with pytest.raises(
        SourceError,
        match=r"000000000001.jpg: 60 x 41 pixels, instances_train2017.json says 60 x 40",
    ):
        split.read(0)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DecodeError, match=str(path)):
        split.read(0)
    path.unlink()
    with pytest.raises(SourceError, match=str(path)):
        split.read(0)


def test_gray_images_are_read_as_rgb(tmp_path: Path) -> None:
    root = write_coco(tmp_path, [entry(1, 1)])
    Image.new("L", (60, 40), 9).save(root / "train2017" / "000000000001.jpg")
    assert torch.equal(
        CocoSplit(root, "train").read(0), torch.full((3, 40, 60), 9, dtype=torch.uint8)
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "expected an object with the lists categories, images, annotations"),
        ('{"images": [], "annotations": [1]}', "expected 'categories' to be a list of objects"),
        ('{"images": [], "annotations": [1]}', "expected 'annotations' to be a list of objects"),
    ],
)
def test_bad_annotations_are_named(tmp_path: Path, content: str, said: str) -> None:
    root = write_coco(tmp_path, [entry(1, 1)])
    path = root / "annotations" / "instances_train2017.json"
    path.write_text(content)
    with pytest.raises(SourceError, match=f"{path}.*{said}"):
        CocoSplit(root, "train")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"id": "12"},
            "whose id is not a whole number other than 0 (number them from 1): number 1",
        ),
        ({"id": 0}, "whose id is not a whole number other than 0"),
        ({"id": True}, "whose id is not a whole number other than 0"),
        ({"id": 2}, "1 annotations are listed twice, by id: 2"),
        ({"image_id": "1"}, "whose image_id is not a whole number: number 1 (id 12) has '1'"),
        ({"image_id": 9}, "whose image_id is not in the file: annotation 12 has 9"),
        ({"category_id": 99}, "whose category_id is not in the file: annotation 12 has 99"),
        ({"category_id": 7.0}, "whose category_id is not a whole number"),
        ({"bbox": [1.0, 2, -3, 4]}, "whose bbox is not x, y, width and height"),
        ({"bbox": [1.0, 2, 3]}, "whose bbox is not x, y, width and height"),
        ({"bbox": [1.0, 2, 3, float("nan")]}, "whose bbox is not x, y, width and height"),
        ({"area": "400"}, "whose area is not a number"),
        ({"area": None}, "whose area is not a number"),
        ({"iscrowd": None}, "whose iscrowd is not 0 or 1"),
        ({"iscrowd": "0"}, "whose iscrowd is not 0 or 1"),
        ({"segmentation": []}, "whose segmentation is not polygons or a run-length code"),
        ({"segmentation": [[]]}, "whose segmentation is not polygons or a run-length code"),
    ],
)
def test_annotations_that_would_score_otherwise_are_refused(
    tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    root = write_coco(tmp_path, [{**entry(12, 1), **fields}, entry(2, 2)])
    with pytest.raises(SourceError) as caught:
        check_coco(root, ExpectedCounts(), threads=1)
    for split in ("train", "val"):
        assert f"instances_{split}2017.json: 1 annotations " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("key", ["id", "image_id", "category_id", "bbox", "area", "iscrowd"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    complete = entry(12, 1)
    del complete[key]
    with pytest.raises(SourceError, match=rf"1 annotations whose {key} is not .* has none"):
        CocoSplit(write_coco(tmp_path, [complete]), "train")


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda content: content["images"].append(content["images"][0]),
            "1 images are listed twice, by id: 1; "
            "1 images are listed twice, by file_name: 000000000001.jpg",
        ),
        (
            lambda content: content["images"].append({**content["images"][0], "id": 9}),
            "1 images are listed twice, by file_name",
        ),
        (
            lambda content: content["images"].append(
                {**content["images"][0], "id": 9, "file_name": "./000000000001.jpg"}
            ),
            "1 images are listed twice, by file_name: 000000000001.jpg",
        ),
        (
            lambda content: content["images"][0].update(file_name="../val2017/1.jpg"),
            "whose file_name is not a path below the folder of the images: number 1 (id 1)",
        ),
        (
            lambda content: content["images"][1].update(width=0),
            "whose width is not a whole number above 0: number 2 (id 2) has 0",
        ),
        (
            lambda content: content["categories"].append({"id": 7, "name": "eight"}),
            "1 categories are listed twice, by id: 7",
        ),
        (
            lambda content: content["categories"].append({"id": 8, "name": "three"}),
            "1 categories are listed twice, by name: three",
        ),
        (lambda content: content["categories"][0].update(name=7), "whose name is not a text"),
    ],
)
def test_images_and_categories_that_are_not_understood(
    tmp_path: Path, change: Change, said: str
) -> None:
    root = write_coco(tmp_path, [entry(1, 1)])
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(SourceError, match=re.escape(f"{path}: ")) as caught:
        CocoSplit(root, "train")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "good"),
    [
        ({}, True),
        # A box that is wider than its outline, as some of COCO's are.
        ({"bbox": [8.0, 8.0, 24.0, 24.0]}, True),
        # Two corners; center and size; an outline in shares of the image.
        ({"bbox": [10.0, 10.0, 30.0, 30.0]}, False),
        ({"bbox": [20.0, 20.0, 20.0, 20.0]}, False),
        ({"segmentation": [[0.1, 0.1, 0.4, 0.1, 0.4, 0.5]]}, False),
    ],
)
def test_boxes_that_are_not_where_the_outlines_are(
    tmp_path: Path, fields: dict[str, Any], good: bool
) -> None:
    right = entry(3, 1)
    wrong = [{**entry(1, 1), **fields}, {**entry(2, 2), **fields}]
    # One of three tells nothing: an outline may be a mistake.
    check_coco(write_coco(tmp_path / "few", [right, entry(4, 2), wrong[0]]), ExpectedCounts())
    root = write_coco(tmp_path / "most", [right, *wrong])
    said = r"2 of 3 boxes are not where their outlines are"
    with nullcontext() if good else pytest.raises(SourceError, match=said):
        check_coco(root, ExpectedCounts(), threads=1)


def test_what_does_not_count_is_counted_before_a_run(tmp_path: Path) -> None:
    crowd = entry(3, 1, iscrowd=1, segmentation={"size": [40, 60], "counts": [2400]})
    root = write_coco(tmp_path, [entry(1, 1), crowd, entry(4, 2, area=0.0)])
    words, _ = check_external_data(CocoDataConfig(dataset="mine", data_dir=str(root)), {})
    assert "2 annotations of train that do not count as objects" in words


def test_known_layout() -> None:
    assert KNOWN["coco2017"] == ExpectedCounts(80, {"train": 118287, "val": 5000})


def test_layout_says_all_that_is_wrong_at_once(tmp_path: Path) -> None:
    root = write_coco(tmp_path, [entry(1, 1), entry(2, 2)])
    seen: list[tuple[int, int]] = []
    expected = ExpectedCounts(2, {"train": 2, "val": 2})
    splits = check_coco(root, expected, threads=1, report=lambda *told: seen.append(told))
    assert set(splits) == {"train", "val"} and seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    (root / "train2017" / "000000000002.jpg").unlink()
    Image.new("RGB", (7, 7)).save(root / "val2017" / "000000000001.jpg")
    (root / "val2017" / "000000000002.jpg").write_bytes(b"no image")
    with pytest.raises(SourceError) as caught:
        check_coco(root, ExpectedCounts(80, {"train": 3, "val": None}), threads=1)
    for text in (
        "train: instances_train2017.json has 2 categories, 80 expected",
        "train: instances_train2017.json has 2 images, 3 expected",
        "train: 1 images are not as annotated: 000000000002.jpg (missing)",
        "val: 2 images are not as annotated: "
        "000000000001.jpg (7 x 7, annotated 60 x 40), 000000000002.jpg",
    ):
        assert text in str(caught.value)


def test_an_image_cut_short_is_not_as_annotated(tmp_path: Path) -> None:
    root = write_coco(tmp_path, [entry(1, 1)])
    image = root / "val2017" / "000000000001.jpg"
    Image.effect_noise((60, 40), 50).convert("RGB").save(image)
    check_coco(root, ExpectedCounts(), threads=1)
    image.write_bytes(image.read_bytes() + b"\0")  # something after the end does no harm
    check_coco(root, ExpectedCounts(), threads=1)
    image.write_bytes(image.read_bytes()[:-300])
    with pytest.raises(
        SourceError, match=r"val: 1 images are not as annotated: .*000000000001.jpg: .*truncated"
    ):
        check_coco(root, ExpectedCounts(), threads=1)


def test_layout_without_annotations_or_with_other_categories(tmp_path: Path) -> None:
    root = write_coco(tmp_path, [entry(1, 1)])
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "eight"
    path.write_text(json.dumps(content))
    with pytest.raises(SourceError, match="different categories"):
        check_coco(root, ExpectedCounts(), threads=1)
    path.unlink()
    with pytest.raises(SourceError, match=r"val: .*instances_val2017.json: not there \(expected"):
        check_coco(root, ExpectedCounts(), threads=1)


def test_nothing_to_train_on(tmp_path: Path) -> None:
    root = write_coco(tmp_path, [entry(1, 1, iscrowd=1)])
    with pytest.raises(SourceError, match="has no object that counts"):
        check_coco(root, ExpectedCounts(), threads=1)


def test_mini_coco_of_digits(tmp_path: Path) -> None:
    """The same files every time, sound, with outlines that fill their boxes from edge to edge."""
    for name in ("one", "two"):
        materialize_coco(tmp_path / name, train=6, val=4)
    splits = check_coco(tmp_path / "one", ExpectedCounts(10, {"train": 6, "val": 4}), threads=1)
    for path in sorted((tmp_path / "one").rglob("*.*")):
        assert (
            path.read_bytes()
            == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
        )
    for index in range(6):
        boxes, labels, masks = splits["train"].objects(index)
        assert 1 <= len(boxes) <= 4 and labels.max() < 10
        for box, mask in zip(boxes.int().tolist(), masks, strict=True):
            rows, columns = mask.nonzero().unbind(1)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(np.array(edges) - box).max() <= 1


def read_private_bytes() -> int:
    """Memory of this process that no other one shares."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(1024 * int(n) for n in re.findall(r"^Private_Dirty: +(\d+)", text, re.MULTILINE))


def test_ranks_share_one_table(tmp_path: Path) -> None:
    """The same objects, and what another process opens takes little memory of its own."""
    outlines = [[x + i / 7 for x in SQUARE for _ in range(2)] * 60 for i in range(2000)]
    found = [entry(i, 1 + i % 2, segmentation=[o]) for i, o in enumerate(outlines, 1)]
    root = write_coco(tmp_path, found)
    parsed = CocoSplit(root, "train")
    path = tmp_path / "table.pt"
    parsed.write_table(path)
    assert path.stat().st_size > 20e6
    before = read_private_bytes()
    shared = CocoSplit(root, "train", table=path)
    assert torch.equal(shared.objects(1)[0], parsed.objects(1)[0])
    assert read_private_bytes() - before < 0.5 * path.stat().st_size
    assert shared.images == parsed.images and shared.names == parsed.names
    for name in ("annotations", "labels", "boxes", "ends", "outlines"):
        assert torch.equal(shared.table[name], parsed.table[name])
