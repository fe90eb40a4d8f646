"""Training and testing a detector: schedule, exact resume, ranks, average precision by hand, and an
overfit.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_cases import entry, write_coco
from detection_cases import SETTINGS, SMALL, small_detector, targets
from PIL import Image
from pycocotools import mask as rle
from ranks import spawn

from mugs import distributed
from mugs.data.dense.coco import CocoSplit
from mugs.data.mini.coco import materialize_coco
from mugs.data.sources.decode import DecodeError
from mugs.engine.layer_decay import build_layer_decay_groups
from mugs.models.config import ViTConfig
from mugs.models.vit import build_vit
from mugs.transfer.detection.config import DetectionConfig, DetectorConfig, Scales
from mugs.transfer.detection.detector import build_detector
from mugs.transfer.detection.evaluate import (
    compute_average_precision,
    detect_split,
    load_test_view,
    merge_parts,
    run_coco_eval,
)
from mugs.transfer.detection.pictures import draw_objects, draw_pictures
from mugs.transfer.detection.train import DetectionTraining, build_detection_schedule

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco") / "mini"
    materialize_coco(root, train=10, val=5)
    return root


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 2e-7),
        (250, 2e-4 * (0.001 + 0.999 / 2)),
        (500, 2e-4),
        (8 * 3665 - 1, 2e-4),
        (8 * 3665, 2e-5),
        (11 * 3665 - 1, 2e-5),
        (11 * 3665, 2e-6),
        (43_979, 2e-6),
    ],
)
def test_schedule_by_hand(step: int, rate: float) -> None:
    """Peak 2e-4: from a thousandth of it over 500 steps, a tenth after 8 epochs, a hundredth after
    11.
    """
    schedule = build_detection_schedule(DetectionConfig(), 3665)
    assert (schedule.total_steps, schedule.wd(step)) == (43_980, 0.05)
    assert schedule.lr(step) == pytest.approx(rate)


def test_rates_by_layer() -> None:
    """Two blocks, decay .5: patch embedding an eighth, heads 1; norms and biases without weight
    decay.
    """
    model = small_detector()
    groups = build_layer_decay_groups(model, model.pyramid.vit, 0.5)
    scales = {id(p): (g["lr_scale"], g["decay"]) for g in groups for p in g["params"]}
    named = dict(model.named_parameters())
    for name, expected in {
        "pyramid.vit.pos_embed": (0.125, True),
        "pyramid.vit.blocks.0.attn.qkv.weight": (0.25, True),
        "pyramid.vit.blocks.1.norm1.weight": (0.5, False),
        "pyramid.scales.0.0.weight": (1.0, True),
        "cascade.box_heads.2.classes.bias": (1.0, False),
        "rpn.head.bbox_pred.weight": (1.0, True),
    }.items():
        assert scales[id(named[name])] == expected, name


def trained(root: Path, folder: Path, config: DetectionConfig) -> Path:
    DetectionTraining(small_detector(), CocoSplit(root, "train"), config, folder, CPU).train()
    return max((folder / "checkpoints").iterdir())


def test_resume_in_the_middle_of_an_epoch_is_bitwise_exact(mini: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = replace(SETTINGS, checkpoint_steps=4)  # three or four steps an epoch, two epochs
    straight = json.loads((trained(mini, tmp_path / "straight", config) / "state.json").read_text())
    shutil.rmtree(trained(mini, tmp_path / "resumed", config))  # as if killed after step 4
    resumed = json.loads((trained(mini, tmp_path / "resumed", config) / "state.json").read_text())
    assert straight["step"] in (6, 8) and resumed["step"] == straight["step"]
    assert resumed["files"] == straight["files"]  # SHA-256 of each
    lines = [
        json.loads(line)
        for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()
    ]
    assert {"loss", "loss_rpn_objectness", "loss_stage3_mask", "lr"} < set(lines[0])


def test_a_bad_image_stops_training_and_is_named(mini: Path, tmp_path: Path) -> None:
    shutil.copytree(mini, tmp_path / "mini")
    path = tmp_path / "mini" / "train2017" / "000000000003.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DecodeError, match=str(path)):
        trained(tmp_path / "mini", tmp_path / "run", SETTINGS)


def on_rank(rank: int, root: Path, out: Path) -> None:
    model = small_detector().train()
    wrapped = distributed.wrap_data_parallel(model)
    for objects in (
        (0, 0),
        (0, rank),
        (2, 0),
    ):  # nothing anywhere; something on one rank; something everywhere
        model.zero_grad(set_to_none=True)
        losses = wrapped(
            torch.ones(2, 3, 64, 64), [targets(n, key=7 * rank + i) for i, n in enumerate(objects)]
        )
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        both = distributed.all_gather_rows(flat[None])
        assert torch.isfinite(both).all() and torch.equal(both[0], both[1])

    split, model = CocoSplit(root, "train"), small_detector()
    DetectionTraining(model, split, replace(SETTINGS, epochs=1), out / "train", CPU).train()
    weights = torch.cat([v.flatten().float() for v in model.state_dict().values()])
    both = distributed.all_gather_rows(weights[None])
    assert torch.equal(both[0], both[1])  # running statistics too
    settings = replace(SETTINGS, detector=replace(SMALL, score_threshold=0.01))
    found = detect_split(
        small_detector(settings.detector), CocoSplit(root, "val"), settings, out / "test", CPU
    )
    assert (found is None) is (rank > 0)


@pytest.mark.slow
def test_two_ranks(mini: Path, tmp_path: Path) -> None:
    """Empty batches on one or all ranks, the same weights on both, and detections as of one rank,
    none twice.
    """
    spawn(on_rank, 2, mini, tmp_path)
    settings = replace(SETTINGS, detector=replace(SMALL, score_threshold=0.01))
    val = CocoSplit(mini, "val")
    alone = detect_split(small_detector(settings.detector), val, settings, tmp_path / "alone", CPU)

    def ordered(path: Path) -> list[dict[str, Any]]:
        return sorted(
            json.loads(path.read_text()),
            key=lambda r: (r["image_id"], -r["score"], r["category_id"]),
        )

    expected = ordered(alone)
    assert {r["image_id"] for r in expected} == {1, 2, 3, 4, 5}
    assert ordered(tmp_path / "test" / "detections.json") == expected


def test_parts_that_do_not_make_up_the_split_are_refused(mini: Path, tmp_path: Path) -> None:
    for name, ids in (("a", [1, 2, 3]), ("b", [3, 5])):
        (tmp_path / name).write_text(json.dumps([{"image_id": i, "objects": []} for i in ids]))
    with pytest.raises(RuntimeError, match=r"found missing or repeated images 3, 4$"):
        merge_parts([tmp_path / "a", tmp_path / "b"], CocoSplit(mini, "val"))


def detection(
    image: int, box: list[float], score: float, size: tuple[int, int] = (40, 60)
) -> dict[str, Any]:
    """A box x, y, width, height of category 7, and the same as a mask."""
    x, y, w, h = map(int, box)
    mask = np.zeros(size, np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    code = rle.encode(mask)
    outline = {"size": list(code["size"]), "counts": code["counts"].decode()}
    return {
        "image_id": image,
        "category_id": 7,
        "score": score,
        "bbox": box,
        "segmentation": outline,
    }


def test_average_precision_by_hand(tmp_path: Path) -> None:
    """The box 20 x 16 in the 20 x 20 object has IoU .8: right at the 7 thresholds .5 to .8 of 10;
    AP75 is 100.
    """
    split = CocoSplit(write_coco(tmp_path, [entry(1, 1)]), "val")
    path = tmp_path / "found.json"
    path.write_text(json.dumps([detection(1, [10.0, 10.0, 20.0, 16.0], 0.9)]))
    found = compute_average_precision(split.annotations, path)
    expected = {"AP": 70.0, "AP50": 100.0, "AP75": 100.0}
    assert found == pytest.approx(
        {f"{kind} {n}": v for kind in ("box", "mask") for n, v in expected.items()}
    )


def test_wrong_detections_cost_precision(tmp_path: Path) -> None:
    """A better scored mistake in front of the right box: precision 1/2 at every recall."""
    split = CocoSplit(write_coco(tmp_path, [entry(1, 1)]), "val")
    path = tmp_path / "found.json"
    results = [
        detection(2, [0.0, 0.0, 10.0, 10.0], 0.95, (60, 40)),
        detection(1, [10.0, 10.0, 20.0, 20.0], 0.9),
    ]
    path.write_text(json.dumps(results))
    assert compute_average_precision(split.annotations, path)["box AP"] == pytest.approx(50)


def test_crowds_are_neither_found_nor_missed(tmp_path: Path) -> None:
    crowd = entry(
        2,
        1,
        iscrowd=1,
        bbox=[40.0, 0, 20, 40],
        segmentation={"size": [40, 60], "counts": [1600, 800]},
    )
    split = CocoSplit(write_coco(tmp_path, [entry(1, 1), crowd]), "val")
    path = tmp_path / "found.json"
    inside = detection(1, [42.0, 5.0, 10.0, 10.0], 0.99)
    path.write_text(json.dumps([inside, detection(1, [10.0, 10.0, 20.0, 20.0], 0.9)]))
    found = compute_average_precision(split.annotations, path)
    assert (found["box AP"], found["mask AP"]) == pytest.approx((100, 100))


def test_nothing_detected_is_zero(tmp_path: Path) -> None:
    split = CocoSplit(write_coco(tmp_path, [entry(1, 1)]), "val")
    assert run_coco_eval(split.annotations, [], "bbox") == [0.0] * 12


def test_empty_and_odd_images_are_tested(tmp_path: Path) -> None:
    """Without objects, with crowds only, one pixel high, and very long: every image gives a part,
    none an error.
    """
    sizes = {1: (60, 40), 2: (400, 8), 3: (8, 400), 4: (50, 1)}
    crowd = entry(1, 1, iscrowd=1, segmentation={"size": [40, 60], "counts": [2400]})
    split = CocoSplit(write_coco(tmp_path, [crowd], sizes=sizes), "val")
    settings = replace(SETTINGS, detector=replace(SMALL, num_classes=2, score_threshold=0.01))
    path = detect_split(small_detector(settings.detector), split, settings, tmp_path / "run", CPU)
    for one in json.loads(path.read_text()):
        width, height = sizes[one["image_id"]]
        assert one["segmentation"]["size"] == [height, width]
        assert (
            one["bbox"][0] + one["bbox"][2] <= width + 1e-3
            and one["bbox"][1] + one["bbox"][3] <= height + 1e-3
        )
    assert load_test_view(split, 1, settings.scales).shape == (
        3,
        2,
        80,
    )  # 400 x 8, held by the longer side of 80


def test_pictures(tmp_path: Path) -> None:
    """Truth on the left, what was found on the right; below a score of .3 nothing is drawn."""
    split = CocoSplit(write_coco(tmp_path, [entry(1, 1)]), "val")
    path = tmp_path / "found.json"
    path.write_text(
        json.dumps([detection(1, [30.0, 5.0, 20.0, 20.0], 0.9), detection(1, [0.0, 0, 5, 5], 0.1)])
    )
    files = draw_pictures(split, path, tmp_path / "pictures", 2)
    assert [f.name for f in files] == ["000000000001.png", "000000000002.png"]
    picture = np.asarray(Image.open(files[0]))
    assert picture.shape == (240, 2 * 360 + 4, 3)
    plain = np.asarray(draw_objects(split.read(0).permute(1, 2, 0).numpy(), []))
    changed = (picture[:, :360] != plain).any(-1), (picture[:, 364:] != plain).any(-1)
    assert changed[0][70:170, 70:170].mean() > 0.95 and not changed[0][:50].any()
    assert changed[1][40:140, 190:290].mean() > 0.95 and not changed[1][:20, :20].any()


@pytest.mark.long
@pytest.mark.timeout(3600)  # minutes, unless many share the machine
def test_overfit(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """32 scenes, 480 steps: box AP 94.5 and mask AP 93.8 after 173 CPU seconds on one thread."""
    torch.set_num_threads(1)
    materialize_coco(tmp_path / "data", train=32, val=1)
    split = CocoSplit(tmp_path / "data", "train")
    detector = DetectorConfig(
        num_classes=10,
        image_size=(96, 96),
        drop_path=0.0,
        width=32,
        fc_width=128,
        head_convs=2,
        rpn_samples=64,
        roi_samples=32,
        proposals_train=150,
        proposals_test=100,
    )
    scales = Scales(
        short_sides=(80,), max_side=112, crop_prob=0.0, flip_prob=0.0, test_short_side=80
    )
    config = replace(
        SETTINGS,
        detector=detector,
        scales=scales,
        epochs=60,
        micro_batch_size=4,
        lr=2e-3,
        layer_decay=1.0,
        decay_epochs=(45, 55),
        warmup_steps=50,
        log_steps=100,
    )
    began = time.process_time()
    torch.manual_seed(0)
    vit = build_vit(ViTConfig(embed_dim=32, depth=4, num_heads=2, patch_size=8, image_size=32))
    model = build_detector(vit, detector, seed=0)
    DetectionTraining(model, split, config, tmp_path / "run", CPU).train()
    found = compute_average_precision(
        split.annotations, detect_split(model, split, config, tmp_path / "run", CPU)
    )
    record_property("cpu_seconds", time.process_time() - began)
    record_property("found", found)
    assert found["box AP"] >= 90 and found["mask AP"] >= 85
