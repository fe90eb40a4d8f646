"""Sampling errors of mIoU, J&F and AP: drawing every image once gives the score itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mugs import distributed
from mugs.transfer.bootstrap import bootstrap_errors, draw_counts
from mugs.transfer.detection import evaluate as detection
from mugs.transfer.segmentation import evaluate as segmentation
from mugs.transfer.video import evaluate as video


def test_the_error_of_a_mean_is_that_of_the_formula() -> None:
    values = np.random.default_rng(0).normal(size=400)
    (error,) = bootstrap_errors(400, lambda draws: (draws @ values / 400)[:, None], draws=4000)
    assert error == pytest.approx(values.std() / 20, rel=0.05)
    assert (draw_counts(7, 5).sum(axis=1) == 7).all()
    assert np.array_equal(draw_counts(7, 5), draw_counts(7, 5))
    # One video tells nothing.
    assert np.isnan(bootstrap_errors(1, lambda draws: draws.astype(float))).all()


def test_errors_of_segmentation(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (30, 20, 20), generator=generator)
    right = torch.rand(labels.shape, generator=generator) < torch.rand(
        (30, 1, 1), generator=generator
    )
    predicted = torch.where(right, labels, (labels + 1) % 4)
    counts = [
        segmentation.count_confusion(*pair, 4) for pair in zip(predicted, labels, strict=True)
    ]
    names = [f"image_{number:02}" for number in range(30)]
    tables = [segmentation.summarize_counts(each) for each in counts]
    segmentation.write_part(tmp_path, names, tables, 4)
    pixels = segmentation.merge_parts(tmp_path, tmp_path / "per_image.npz")
    stored = np.load(tmp_path / "per_image.npz")
    assert stored["names"].tolist() == names and np.array_equal(stored["pixels"], pixels)
    errors = segmentation.estimate_errors(pixels)
    # By hand: the same draws, scored from the summed confusion matrices.
    scores = [
        segmentation.compute_scores(
            torch.stack([int(n) * c for n, c in zip(draw, counts, strict=True)]).sum(dim=0)
        )
        for draw in draw_counts(30, 1000)[:200]
    ]
    assert errors.miou == pytest.approx(np.std([s.miou for s in scores]), rel=0.2)
    assert errors.aacc == pytest.approx(np.std([s.aacc for s in scores]), rel=0.2)
    assert errors.miou > 1


def test_parts_of_all_ranks_are_merged_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    tables = {name: np.full((3, 2), number) for number, name in enumerate("abcd")}
    for rank, own in enumerate(("ad", "b", "c")):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        segmentation.write_part(tmp_path, list(own), [tables[name] for name in own], 2)
    pixels = segmentation.merge_parts(tmp_path, tmp_path / "per_image.npz")
    assert pixels[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_errors_of_videos(tmp_path: Path) -> None:
    class Videos:
        names = ("a", "b", "c")

    (tmp_path / "scores").mkdir()
    objects = {"a": [(0.2, 0.4)], "b": [(0.8, 0.8), (0.6, 0.8)], "c": [(1.0, 0.9)]}
    for name, found in objects.items():
        content = [{"J": j, "F": f} for j, f in found]
        (tmp_path / "scores" / f"{name}.json").write_text(json.dumps(content))
    errors = video.estimate_errors(tmp_path, Videos())  # type: ignore[arg-type]
    # All 27 draws of three videos, each as likely.
    means = []
    for draw in np.ndindex(3, 3, 3):
        drawn = [pair for place in draw for pair in objects["abc"[place]]]
        means.append(100 * np.mean(drawn, axis=0))
    j, f = np.std(means, axis=0)
    assert (errors.j, errors.f) == pytest.approx((j, f), rel=0.1)
    assert errors.jf == pytest.approx(np.std(np.mean(means, axis=1)), rel=0.1)


@pytest.fixture
def found(tmp_path: Path) -> tuple[Path, list[dict[str, object]]]:
    """Annotations of twelve images, up to three boxes each, and two detections of each box."""
    generator = np.random.default_rng(0)
    images: list[object] = []
    entries: list[object] = []
    results: list[dict[str, object]] = []
    for number in range(1, 13):
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 100, "height": 80})
        for _ in range(generator.integers(0, 4)):
            x, y = generator.uniform(0, 50, 2).tolist()
            box, category = [x, y, 30.0, 25.0], int(generator.integers(1, 3))
            entries.append(
                {
                    **{"id": len(entries) + 1, "image_id": number, "category_id": category},
                    **{"bbox": box, "area": 750.0, "iscrowd": 0},
                }
            )
            for shift in generator.uniform(0, 12, 2).tolist():
                one = {"image_id": number, "category_id": category, "bbox": [x + shift, y, 30, 25]}
                results.append({**one, "score": float(generator.uniform())})
    path = tmp_path / "truth.json"
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    content = {"images": images, "annotations": entries, "categories": categories, "info": {}}
    path.write_text(json.dumps(content))
    return path, results


def test_average_precision_of_a_draw_is_that_of_pycocotools(
    found: tuple[Path, list[dict[str, object]]], tmp_path: Path
) -> None:
    path, results = found
    matches = detection.collect_matches(detection.match_detections(path, results, "bbox"))
    expected = detection.run_coco_eval(path, results, "bbox")[:3]
    assert matches.average_precision(np.ones(12, dtype=np.int64)) == pytest.approx(expected)
    assert 0.2 < expected[0] < 0.9
    # Images that are there twice, and one that is not: with copies under other numbers.
    counts = np.array([2, 0, 1, 1, 3, 1, 1, 0, 1, 1, 0, 1])
    truth = json.loads(path.read_text())
    copies: dict[str, list[dict[str, object]]] = {"images": [], "annotations": [], "results": []}
    sources = {"images": truth["images"], "annotations": truth["annotations"], "results": results}
    for kind, each in ((k, e) for k, entries in sources.items() for e in entries):
        key = "id" if kind == "images" else "image_id"
        for copy in range(counts[int(each[key]) - 1]):
            changed = {**each, key: 100 * copy + int(each[key])}
            if kind == "annotations":
                changed["id"] = len(copies[kind]) + 1
            copies[kind].append(changed)
    other = tmp_path / "copies.json"
    other.write_text(json.dumps({**truth, **{k: copies[k] for k in ("images", "annotations")}}))
    drawn = detection.run_coco_eval(other, copies["results"], "bbox")[:3]
    assert matches.average_precision(counts) == pytest.approx(drawn, abs=1e-9)


def test_errors_of_average_precision(
    found: tuple[Path, list[dict[str, object]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, results = found
    monkeypatch.setattr(detection, "KINDS", {"box": "bbox"})
    (tmp_path / "found.json").write_text(json.dumps(results))
    errors = detection.estimate_errors(path, tmp_path / "found.json")
    assert errors.keys() == {"box AP", "box AP50", "box AP75"}
    assert all(1 < error < 30 for error in errors.values())
    (tmp_path / "none.json").write_text("[]")
    assert detection.estimate_errors(path, tmp_path / "none.json") == {}
