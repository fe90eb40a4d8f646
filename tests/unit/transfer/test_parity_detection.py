"""Detection against values of mmdetection 2.11, at the tolerances of float32."""

import math

import numpy as np
import pytest
import torch
from golden_values import Golden, read_facts, relative_gap, rename
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from mugs.models.config import ViTConfig
from mugs.models.vit import build_vit
from mugs.transfer.detection import cascade as cascade_module
from mugs.transfer.detection import detector as detector_module
from mugs.transfer.detection import matching
from mugs.transfer.detection.boxes import Targets, decode_deltas, encode_deltas, generalized_iou
from mugs.transfer.detection.cascade import (
    STAGES,
    Cascade,
    SampledBoxes,
    compute_box_losses,
    sample_boxes,
    select_best_boxes,
)
from mugs.transfer.detection.config import DetectorConfig
from mugs.transfer.detection.detector import build_detector
from mugs.transfer.detection.heads import cut_mask_targets, paste_masks
from mugs.transfer.detection.matching import match_boxes, sample_matches
from mugs.transfer.detection.rpn import DELTA_STDS, RPN, inside_image

RPN_NAMES = {
    "rpn_conv": "head.conv.0.0",
    "rpn_cls": "head.cls_logits",
    "rpn_reg": "head.bbox_pred",
}
CASCADE_NAMES = {
    r"bbox_head": "box_heads",
    r"mask_head": "mask_heads",
    r"shared_convs\.(\d)\.conv": r"trunk.\1.0",
    r"shared_convs\.(\d)\.bn": r"trunk.\1.1",
    r"shared_fcs\.0": "trunk.5",
    r"fc_cls": "classes",
    r"fc_reg": "boxes",
    r"convs\.(\d)\.conv": r"trunk.\1.0",
    r"upsample": "predictor.conv5_mask",
    r"conv_logits": "predictor.mask_fcn_logits",
}
SMALL = DetectorConfig(
    num_classes=6, width=16, fc_width=32, proposals_test=60, max_detections=30, image_size=(64, 64)
)
STRIDES = (4, 8, 16, 32)


def build_targets(objects: Tensor, labels: Tensor, masks: Tensor, size: list[int]) -> Targets:
    return Targets(objects, labels, masks, (size[0], size[1]), key=0)


def use_draws(monkeypatch: pytest.MonkeyPatch, *draws: Tensor) -> None:
    """Give each image in turn its draws."""
    queue = list(draws)
    monkeypatch.setattr(matching, "hashed_bits", lambda *_: queue.pop(0))


# Initial values.


def test_initial_values() -> None:
    """Trap: the layers of torchvision start otherwise, with 0.42 of the spread in one of them."""
    vit = build_vit(ViTConfig(embed_dim=384, depth=1, num_heads=6, patch_size=16, image_size=32))
    model = build_detector(vit, DetectorConfig(), seed=0)
    parts = {"rpn_head.": (model.rpn, RPN_NAMES), "roi_head.": (model.cascade, CASCADE_NAMES)}
    fpn = {
        r"lateral_convs\.(\d)\.conv": r"inner_blocks.\1.0",
        r"fpn_convs\.(\d)\.conv": r"layer_blocks.\1.0",
    }
    parts["neck."] = (model.fpn, fpn)
    facts = read_facts("det_initial_values")
    seen = 0
    for name, (shape, rule, std) in facts.items():
        prefix = next(p for p in parts if name.startswith(p))
        module, names = parts[prefix]
        value = module.state_dict()[rename(name, prefix, names)]
        assert list(value.shape) == shape, name
        if rule in ("zeros", "ones"):
            assert (value == float(rule == "ones")).all(), name
        else:
            assert abs(float(value.std()) / std - 1) <= 6 / math.sqrt(2 * value.numel()), name
        if rule == "xavier_uniform":
            assert value.abs().max() <= std * math.sqrt(3) * (1 + 1e-6), name
        seen += 1
    ours = [m.state_dict() for m, _ in parts.values()]
    assert seen == sum(not n.endswith("num_batches_tracked") for state in ours for n in state)


# Proposals.


@pytest.fixture(scope="module")
def rpn_golden() -> Golden:
    return Golden("det_rpn")


def build_rpn(golden: Golden, samples: int = 256) -> RPN:
    config = DetectorConfig(width=16, rpn_samples=samples, proposals_train=60, proposals_test=60)
    rpn = RPN(config, golden.facts["strides"])
    golden.load(rpn, "rpn_head.", RPN_NAMES)
    return rpn


def build_rpn_targets(golden: Golden, case: str) -> list[Targets]:
    empty = torch.zeros(0, 4)
    boxes = [golden[f"objects.{o}"] if o else empty for o in golden.facts["cases"][case]["objects"]]
    sizes = golden.facts["image_sizes"]
    return [
        build_targets(b, torch.zeros(len(b), dtype=torch.long), torch.zeros(len(b), *s), s)
        for b, s in zip(boxes, sizes, strict=True)
    ]


def test_rpn_outputs_and_proposals(rpn_golden: Golden) -> None:
    rpn = build_rpn(rpn_golden).eval()
    logits, deltas, anchors = rpn(rpn_golden.maps(5))
    assert relative_gap(torch.cat(logits, 1), rpn_golden["logits"]) <= 1e-5
    assert relative_gap(torch.cat(deltas, 1), rpn_golden["deltas"]) <= 1e-5
    assert torch.equal(torch.cat(anchors), rpn_golden["anchors"])
    sizes = [(h, w) for h, w in rpn_golden.facts["image_sizes"]]
    for image, found in enumerate(rpn.proposals(logits, deltas, anchors, sizes)):
        inside = inside_image(rpn_golden["anchors"], sizes[image])
        assert torch.equal(inside, rpn_golden[f"inside.image{image}"].bool())
        expected = rpn_golden[f"proposals.image{image}"][:, :4]
        assert (found - expected).abs().max() <= 1e-3


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("case", ["both", "second_empty", "both_empty", "both_few"])
def test_rpn_samples(
    case: str, image: int, rpn_golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = build_rpn_targets(rpn_golden, case)[image].boxes
    inside = rpn_golden[f"inside.image{image}"].bool()
    usable = inside.nonzero()[:, 0]
    anchors = rpn_golden["anchors"]
    matched = match_boxes(anchors[usable], objects, positive=0.7, negative=0.3, promote=0.3)
    name = f"{case}.image{image}"
    # Counted from 1 there, and background is 0.
    assert torch.equal(matched + 1, rpn_golden[f"{name}.assigned"][inside].long())
    use_draws(monkeypatch, rpn_golden[f"draws.image{image}"][inside])
    facts = rpn_golden.facts["cases"][case]
    positive, negative = sample_matches(matched, facts["samples"], 0.5, key=0)
    assert torch.equal(usable[positive], rpn_golden[f"{name}.positive"])
    assert torch.equal(usable[negative], rpn_golden[f"{name}.negative"])
    assert torch.equal(matched[positive], rpn_golden[f"{name}.positive_object"])
    if len(positive):
        wanted = encode_deltas(anchors[usable[positive]], objects[matched[positive]], DELTA_STDS)
        assert relative_gap(wanted, rpn_golden[f"{name}.target_deltas"]) <= 1e-6


@pytest.mark.parametrize("case", ["both", "second_empty", "both_empty", "both_few"])
def test_rpn_losses_and_gradients(
    case: str, rpn_golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image without objects counts for one positive anchor in the divisor."""
    rpn = build_rpn(rpn_golden, rpn_golden.facts["cases"][case]["samples"])
    draws = [rpn_golden[f"draws.image{i}"][rpn_golden[f"inside.image{i}"].bool()] for i in (0, 1)]
    use_draws(monkeypatch, *draws)
    losses = rpn.losses(*rpn(rpn_golden.maps(5)), build_rpn_targets(rpn_golden, case))
    found = torch.stack([losses["rpn_objectness"], losses["rpn_box"]])
    assert relative_gap(found, rpn_golden[f"{case}.losses"]) <= 1e-5
    found.sum().backward()
    for name, layer in (("rpn_cls", rpn.head.cls_logits), ("rpn_reg", rpn.head.bbox_pred)):
        expected = rpn_golden[f"{case}.gradient.{name}.weight"]
        assert layer.weight.grad is not None
        if expected.any():
            assert relative_gap(layer.weight.grad, expected) <= 1e-4, name
        else:
            assert not layer.weight.grad.any()


# Boxes and their objects.


@pytest.mark.parametrize("coder", range(4))
def test_box_coders(coder: int) -> None:
    golden = Golden("det_boxes")
    stds = (DELTA_STDS, *(s.stds for s in STAGES))[coder]
    assert torch.equal(golden["coder.stds"][coder], torch.tensor(stds))
    boxes = golden["coder.boxes"]
    encoded = encode_deltas(boxes, golden["coder.targets"], stds)
    assert relative_gap(encoded, golden[f"coder.encoded{coder}"]) <= 1e-6
    decoded = decode_deltas(boxes, golden["coder.deltas"], stds)
    assert relative_gap(decoded, golden[f"coder.decoded{coder}"]) <= 1e-6
    clipped = clip_boxes_to_image(decoded, (100, 140))
    assert (clipped - golden[f"coder.clipped{coder}"]).abs().max() <= 1e-4


def test_generalized_iou_of_pairs() -> None:
    golden = Golden("det_boxes")
    loss = 1 - generalized_iou(golden["giou.boxes"], golden["giou.targets"])
    assert (loss - golden["giou.loss"]).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("name", "positive", "negative", "promote"),
    [
        ("rpn", 0.7, 0.3, 0.3),
        ("no_objects_rpn", 0.7, 0.3, 0.3),
        *((f"stage{n}", s.iou, s.iou, None) for n, s in enumerate(STAGES, 1)),
    ],
)
def test_matched_objects(
    name: str, positive: float, negative: float, promote: float | None
) -> None:
    golden = Golden("det_boxes")
    boxes = golden["assign.boxes"]
    objects = golden["assign.objects"] if name != "no_objects_rpn" else torch.zeros(0, 4)
    found = match_boxes(boxes, objects, positive=positive, negative=negative, promote=promote)
    assert torch.equal(found + 1, golden[f"assign.{name}"])
    best = box_iou(golden["assign.objects"], boxes).amax(dim=0)
    assert (best - golden["assign.iou"]).abs().max() <= 1e-6


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "case", ["distinct", "distinct_few", "equal_boxes", "equal_boxes_few", "no_objects"]
)
def test_samples_of_a_stage(case: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two objects with one box, each one's own box stands for it: both are learnt."""
    golden = Golden("det_stage_targets")
    config = DetectorConfig(num_classes=6, roi_samples=golden.facts["cases"][case]["samples"])
    name = f"{case}.stage{stage}"
    objects, labels = golden[f"{case}.objects"], golden[f"{case}.object_labels"]
    target = build_targets(objects, labels, torch.zeros(len(objects), 1, 1), [1, 1])
    use_draws(monkeypatch, golden[f"{name}.draws"])
    proposals = golden[f"{case}.proposals"]
    found = sample_boxes(proposals, target, STAGES[stage - 1], stage - 1, config)
    places = torch.cat([golden[f"{name}.positive"], golden[f"{name}.negative"]])
    assert torch.equal(found.boxes, torch.cat([objects, proposals])[places])
    assert torch.equal(found.boxes, golden[f"{name}.boxes"])
    assert torch.equal(found.labels, golden[f"{name}.labels"])
    assert torch.equal(found.objects, golden[f"{name}.positive_object"])
    positives = len(found.objects)
    assert torch.equal(objects[found.objects], golden[f"{name}.box_targets"][:positives])
    given = golden[f"{name}.positive_is_object"].bool()
    assert torch.equal(found.given[:positives], given) and not found.given[positives:].any()


# Losses.


@pytest.mark.parametrize("positives", [True, False])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_of_a_stage(stage: int, positives: bool) -> None:
    golden = Golden("det_losses")
    labels = golden["labels"] if positives else torch.full((24,), 6)
    count = int((labels < 6).sum())
    boxes = golden["box_targets"][:count]
    target = build_targets(boxes, labels[:count], torch.zeros(count, 1, 1), [1, 1])
    sampled = SampledBoxes(
        golden["rois"], labels, torch.arange(count), torch.zeros(24, dtype=torch.bool)
    )
    deltas = golden["deltas"].view(24, 6, 4)
    chosen = STAGES[stage - 1]
    losses = compute_box_losses(golden["logits"], deltas, [sampled], [target], chosen)
    found = chosen.weight * torch.stack([losses["class"], losses["box"]])
    name = "losses" if positives else "losses_without_positives"
    assert (found - golden[f"stage{stage}.{name}"]).abs().max() <= 1e-5


def test_mask_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden("det_losses")
    cascade = Cascade(SMALL, STRIDES)
    monkeypatch.setattr(cascade.mask_heads[0], "forward", lambda _: golden["mask.logits"])
    monkeypatch.setattr(cascade_module, "pool_regions", lambda *_: torch.zeros(5))
    wanted = golden["mask.targets"].float()
    monkeypatch.setattr(cascade_module, "cut_mask_targets", lambda *_: wanted)
    labels = golden["mask.labels"]
    target = build_targets(torch.zeros(5, 4), labels, torch.zeros(5, 1, 1), [1, 1])
    given = torch.zeros(5, dtype=torch.bool)
    sampled = SampledBoxes(torch.zeros(5, 4), labels, torch.arange(5), given)
    loss = cascade._mask_loss([], [sampled], [target], 0)
    assert (loss - golden["mask.loss"]).abs() <= 1e-5


@pytest.mark.parametrize("case", range(3))
def test_mask_targets(case: int) -> None:
    """Trap: without zeros beyond the edge, cells of objects at the edge come out larger."""
    golden = Golden("det_mask_targets")
    bitmaps, index, boxes = (golden[f"case{case}.{n}"] for n in ("bitmaps", "object", "boxes"))
    found = cut_mask_targets(bitmaps, index, boxes)
    assert torch.equal(found, golden[f"case{case}.targets"].float())


# The cascade as a whole.


@pytest.fixture(scope="module")
def cascade_golden() -> Golden:
    return Golden("det_cascade")


def build_cascade(golden: Golden) -> Cascade:
    cascade = Cascade(SMALL, STRIDES)
    golden.load(cascade, "roi_head.", CASCADE_NAMES)
    return cascade


@pytest.mark.parametrize("case", ["running_statistics", "batch_statistics", "rectangles"])
def test_cascade_losses(case: str, cascade_golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = build_cascade(cascade_golden).train(case == "batch_statistics")
    prefix = "rectangles." if case == "rectangles" else ""
    proposals, targets = [], []
    for image, size in enumerate(cascade_golden.facts["image_sizes"]):
        parts = ("objects", "object_labels", "bitmaps", "proposals")
        *given, boxes = (cascade_golden[f"{prefix}image{image}.{part}"] for part in parts)
        targets.append(build_targets(*given, size))
        proposals.append(boxes)
    handed: list[list[Tensor]] = []
    refine = cascade_module.refine_proposals

    def refine_and_keep(*arguments: object) -> list[Tensor]:
        handed.append(refine(*arguments))
        return handed[-1]

    monkeypatch.setattr(cascade_module, "refine_proposals", refine_and_keep)
    losses = cascade.losses(cascade_golden.maps(), proposals, targets)
    expected = cascade_golden["rectangles.losses" if prefix else f"losses.{case}"]
    for column, (name, tolerance) in enumerate((("class", 1e-4), ("box", 1e-4), ("mask", 1e-5))):
        found = torch.stack([losses[f"stage{stage}_{name}"] for stage in (1, 2, 3)])
        assert relative_gap(found, expected[:, column]) <= tolerance, name
    if not prefix:
        for stage, boxes_of_images in zip((2, 3), handed, strict=False):
            for image, found in enumerate(boxes_of_images):
                wanted = cascade_golden[f"{case}.proposals_for_stage{stage}.image{image}"]
                assert (found - wanted).abs().max() <= 1e-3


@pytest.mark.parametrize("image", [0, 1])
def test_inference(image: int, cascade_golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = build_vit(ViTConfig(embed_dim=16, depth=4, num_heads=2, patch_size=16, image_size=32))
    model = build_detector(vit, SMALL, seed=0).eval()
    cascade_golden.load(model.cascade, "roi_head.", CASCADE_NAMES)
    maps = [m[image : image + 1] for m in cascade_golden.maps(5)]
    monkeypatch.setattr(model, "_maps", lambda _: maps)
    proposals = cascade_golden[f"image{image}.proposals"]
    monkeypatch.setattr(model.rpn, "proposals", lambda *_: [proposals])
    pasted: list[Tensor] = []

    def paste_and_keep(masks: Tensor, *arguments: object) -> Tensor:
        pasted.append(masks)
        return paste_masks(masks, *arguments)

    monkeypatch.setattr(detector_module, "paste_masks", paste_and_keep)
    size, original = (
        tuple(cascade_golden.facts[name][image]) for name in ("image_sizes", "original_sizes")
    )
    with torch.no_grad():
        found = model.detect(torch.zeros(1, 3, 128, 160), size, original)
    name = f"test{image}"
    assert torch.equal(found.labels, cascade_golden[f"{name}.labels"])
    assert (found.scores - cascade_golden[f"{name}.scores"]).abs().max() <= 1e-5
    assert (found.boxes - cascade_golden[f"{name}.boxes"]).abs().max() <= 1e-3
    probabilities = cascade_golden[f"{name}.mask_probabilities"]
    assert (pasted[0] - probabilities).abs().max() <= 1e-4
    packed = cascade_golden[f"{name}.masks_packed"].numpy()
    masks = np.unpackbits(packed, axis=2)[:, :, : original[1]].astype(bool)
    assert int((found.masks.numpy() != masks).sum()) <= 20


@pytest.mark.parametrize("image", [0, 1])
def test_choice_among_the_last_boxes(image: int, cascade_golden: Golden) -> None:
    name = f"test{image}"
    (height, width), (tall, wide) = (
        cascade_golden.facts[n][image] for n in ("image_sizes", "original_sizes")
    )
    deltas = cascade_golden[f"{name}.last_deltas"].view(-1, 6, 4)
    decoded = decode_deltas(cascade_golden[f"{name}.last_rois"][:, None], deltas, STAGES[2].stds)
    scale = torch.tensor([wide / width, tall / height] * 2)
    boxes = clip_boxes_to_image(decoded, (height, width)) * scale
    probabilities = cascade_golden[f"{name}.mean_logits"].softmax(dim=1)[:, :-1]
    found, scores, labels = select_best_boxes(boxes, probabilities, SMALL)
    kept = cascade_golden[f"{name}.kept"]
    assert torch.equal(found, boxes.view(-1, 4)[kept])
    assert torch.equal(labels, kept % 6)
    assert (scores - cascade_golden[f"{name}.scores"]).abs().max() <= 1e-5


@pytest.mark.parametrize("case", range(4))
def test_best_boxes(case: int) -> None:
    golden = Golden("det_final")
    config = DetectorConfig(num_classes=6, max_detections=20 if case > 1 else 100)
    name = f"nms{case}"
    probabilities = golden[f"{name}.probabilities"][:, :-1]
    found, scores, labels = select_best_boxes(golden[f"{name}.boxes"], probabilities, config)
    assert torch.equal(torch.cat([found, scores[:, None]], 1), golden[f"{name}.detections"])
    assert torch.equal(labels, golden[f"{name}.labels"])
    rows = golden[f"{name}.boxes"].view(-1, 4)[golden[f"{name}.kept"]]
    assert torch.equal(found, rows)


def test_pasted_masks() -> None:
    golden = Golden("det_final")
    found = paste_masks(golden["paste.probabilities"], golden["paste.boxes"], (70, 93))
    assert torch.equal(found, golden["paste.masks"].bool())
