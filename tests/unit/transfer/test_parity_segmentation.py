"""Segmentation against values of mmsegmentation, at the tolerances of float32."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from golden_values import Golden, relative_gap
from torch import Tensor, nn

from mugs.data.dense.label_maps import VOID
from mugs.models.config import ViTConfig
from mugs.models.vit import build_vit
from mugs.transfer.segmentation.config import SegmentationConfig, SegmenterConfig
from mugs.transfer.segmentation.evaluate import (
    argmax_at_size,
    compute_scores,
    count_confusion,
    slide_windows,
)
from mugs.transfer.segmentation.heads import (
    ChannelDropout,
    UPerHead,
    build_fcn_head,
    resize_bilinear,
)
from mugs.transfer.segmentation.model import LinearSegmenter, Segmenter, pixel_loss
from mugs.transfer.segmentation.train import build_segmenter_groups

UPERNET = {
    r"psp_modules\.(\d)\.1\.conv\.": r"pools.\1.1.",
    r"psp_modules\.(\d)\.1\.bn\.": r"pools.\1.2.",
    r"lateral_convs\.": "laterals.",
    r"fpn_convs\.": "outputs.",
    r"fpn_bottleneck": "fuse",
    r"\.conv\.": ".0.",
    r"\.bn\.": ".1.",
    r"conv_seg": "classifier.1",
}
FCN = {r"convs\.0\.conv": "0", r"convs\.0\.bn": "1", "conv_seg": "3.1"}


@pytest.fixture(scope="module")
def upernet() -> Golden:
    return Golden("seg_upernet")


@pytest.fixture
def heads(upernet: Golden) -> nn.ModuleList:
    """Both heads, batch norms on their running statistics."""
    decode = UPerHead(16, 24, 7, dropout=0.1)
    auxiliary = build_fcn_head(16, 20, 7, 0.1)
    upernet.load(decode, "decode_head.", UPERNET)
    upernet.load(auxiliary, "auxiliary_head.", FCN)
    return nn.ModuleList([decode, auxiliary]).eval()


def test_upernet_logits(upernet: Golden, heads: nn.ModuleList) -> None:
    maps = upernet.maps()
    assert relative_gap(heads[0](maps), upernet["eval.decode_logits"]) <= 1e-5
    assert relative_gap(heads[1](maps[2]), upernet["eval.auxiliary_logits"]) <= 1e-5


@pytest.mark.parametrize("case", ["some_void", "dropout", "second_image_void", "all_void"])
def test_upernet_losses_and_gradients(case: str, upernet: Golden, heads: nn.ModuleList) -> None:
    maps = [x.clone().requires_grad_() for x in upernet.maps()]
    if case == "dropout":
        for head, name in zip(heads, ("decode", "auxiliary"), strict=True):
            (dropout,) = (m for m in head.modules() if isinstance(m, ChannelDropout))
            dropout.uniform = 1.0 - upernet[f"dropout.{name}_kept"].float()
    segmenter = Segmenter()
    segmenter.weights = (1.0, SegmenterConfig().auxiliary_weight)
    labels = upernet["labels.some_void" if case == "dropout" else f"labels.{case}"].long()
    losses = segmenter.loss([heads[0](maps), heads[1](maps[2])], labels)
    found = torch.stack([losses["decode"], losses["auxiliary"]])
    assert (found - upernet[f"loss.{case}"]).abs().max() <= 1e-5
    found.sum().backward()
    expected = {n: x for n, x in upernet.tensors.items() if n.startswith(f"gradient.{case}.")}
    assert len(expected) == (11 if case in ("some_void", "dropout") else 0)
    decode, auxiliary = heads
    parameters = {
        "decode_head.conv_seg.weight": decode.classifier[1].weight,
        "decode_head.conv_seg.bias": decode.classifier[1].bias,
        "decode_head.lateral_convs.0.bn.weight": decode.laterals[0][1].weight,
        "decode_head.psp_modules.1.1.conv.weight": decode.pools[1][1].weight,
        "auxiliary_head.conv_seg.weight": auxiliary[3][1].weight,
        "auxiliary_head.conv_seg.bias": auxiliary[3][1].bias,
        "auxiliary_head.convs.0.conv.weight": auxiliary[0].weight,
        **{f"map{level}": x for level, x in enumerate(maps)},
    }
    for name, gradient in expected.items():
        ours = parameters[name.removeprefix(f"gradient.{case}.")].grad
        assert ours is not None and relative_gap(ours, gradient) <= 1e-4, name


def linear_segmenter(width: int, num_classes: int) -> LinearSegmenter:
    vit = build_vit(ViTConfig(embed_dim=width, depth=4, num_heads=2, patch_size=8, image_size=32))
    return LinearSegmenter(vit, SegmenterConfig(variant="linear", num_classes=num_classes))


@pytest.mark.parametrize(
    ("width", "num_classes", "key"),
    [(384, 150, "tensors_at_vit_s_150_classes"), (16, 7, "tensors_in_the_tiny_file")],
)
def test_linear_head_is_one_classifier_that_decays(width: int, num_classes: int, key: str) -> None:
    """Trap: the config of iBOT names a batch norm, but none is built; the bias decays too."""
    facts = Golden("seg_linear").facts
    model = linear_segmenter(width, num_classes)
    found = {f"conv_seg.{n.split('.')[-1]}": p for n, p in model.head.state_dict().items()}
    assert {name: list(p.shape) for name, p in found.items()} == facts[key]
    groups = build_segmenter_groups(model, SegmentationConfig(variant="linear"))
    decayed = {id(p) for group in groups if group["decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(decayed) == len(facts["weight_decay_on"])


@pytest.mark.parametrize("training", [True, False])
def test_linear_head(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden("seg_linear")
    model = linear_segmenter(16, 7).train(training)
    golden.load(model.head, "decode_head.", {"conv_seg": "1"})
    monkeypatch.setattr(model.backbone, "tapped_maps", lambda _: golden.maps())
    (logits,) = model(torch.zeros(2, 3, 8, 8))
    assert relative_gap(logits, golden["logits"]) <= 1e-5
    loss = pixel_loss(logits, golden["labels"].long())
    assert (loss - golden["loss"]).abs() <= 1e-5
    loss.backward()
    for name in ("weight", "bias"):
        ours = model.head[1].get_parameter(name).grad
        assert relative_gap(ours, golden[f"gradient.decode_head.conv_seg.{name}"]) <= 1e-4


class Stand(Segmenter):
    """A segmenter whose ViT is one convolution, plain or with the four maps of a pyramid."""

    def __init__(self, golden: Golden, kind: str) -> None:
        super().__init__()
        self.backbone = SimpleNamespace(vit=SimpleNamespace(config=SimpleNamespace(patch_size=16)))
        self.patches = nn.Conv2d(3, 16, 16, stride=16)
        golden.load(self.patches, "backbone.conv.", {})
        self.head = nn.Conv2d(16, 5, 1) if kind == "plain" else UPerHead(16, 24, 5, dropout=0.1)
        names = {"conv_seg.": ""} if kind == "plain" else UPERNET
        golden.load(self.head, f"{kind}.decode_head.", names)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.patches(images)
        if isinstance(self.head, nn.Conv2d):
            return [self.head(x)]
        scaled = [F.interpolate(x, scale_factor=float(s)) for s in (4, 2)]
        return [self.head([*scaled, x, F.max_pool2d(x, 2)])]


@pytest.mark.parametrize("kind", ["plain", "pyramid"])
@pytest.mark.parametrize(
    "case", ["both_sides_over", "short_side_equal", "long_72", "long_80", "long_64"]
)
def test_sliding_windows(kind: str, case: str) -> None:
    """Trap: a short side below the window is not padded; what the cells leave out is stretched."""
    golden = Golden("seg_slide")
    facts = golden.facts["cases"][case]
    model = Stand(golden, kind).eval()
    with torch.no_grad():
        logits = slide_windows(
            model.logits, golden[f"{case}.image"], num_classes=5, window=96, stride=64
        )
        apart = 6 if kind == "plain" else 9
        expected = golden[f"{case}.{kind}.logits"]
        assert relative_gap(logits[:, ::apart, ::apart], expected) <= 1e-5
        full = resize_bilinear(logits[None], tuple(facts["original_size"]))[0, :, ::9, ::9]
        assert relative_gap(full, golden[f"{case}.{kind}.resized_logits"]) <= 1e-5
        labels = argmax_at_size(logits, *facts["original_size"])
    wrong = labels != golden[f"{case}.{kind}.label_map"]
    assert wrong.float().mean() <= 2e-4


@pytest.mark.parametrize("case", range(10))
def test_scores(case: int) -> None:
    golden = Golden("seg_metrics")
    facts = golden.facts[case]
    classes = facts["num_classes"]
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for image in range(facts["images"]):
        labels = golden[f"case{case}.label{image}"]
        if facts["reduce_zero_label"]:
            # uint8 wraps: 0 becomes 255, which is void; void stays.
            labels = torch.where(labels == VOID, VOID, labels - 1)
        predicted = golden[f"case{case}.prediction{image}"]
        counts += count_confusion(predicted, labels, classes)
    found = compute_scores(counts)
    expected = [facts[name] for name in ("miou", "macc", "aacc")]
    assert [found.miou / 100, found.macc / 100, found.aacc / 100] == pytest.approx(
        expected, abs=1e-11
    )
    hit, labeled, chosen = counts.diagonal().double(), counts.sum(1), counts.sum(0)
    for values, name in ((hit / (labeled + chosen - hit), "iou"), (hit / labeled, "accuracy")):
        wanted = [float("nan") if value is None else value for value in facts[name]]
        assert values.tolist() == pytest.approx(wanted, abs=1e-11, nan_ok=True)
