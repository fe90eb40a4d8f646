"""Heads, loss, sliding windows and scores against naive versions and values worked out by hand."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mugs.models.config import ViTConfig
from mugs.models.vit import build_vit
from mugs.transfer.segmentation.config import SegmenterConfig
from mugs.transfer.segmentation.evaluate import (
    SegmentationScores,
    argmax_at_size,
    compute_scores,
    count_confusion,
    slide_windows,
    window_starts,
)
from mugs.transfer.segmentation.heads import ChannelDropout, UPerHead
from mugs.transfer.segmentation.model import (
    Segmenter,
    SemanticFPN,
    UPerNet,
    build_segmenter,
    count_segmenter_flops,
    pixel_loss,
)

TINY = ViTConfig(embed_dim=24, depth=4, num_heads=2, patch_size=8, image_size=32)


def segmenter(variant: str, **options: Any) -> Segmenter:
    torch.manual_seed(0)
    config = SegmenterConfig(variant=variant, num_classes=5, auxiliary_channels=12, **options)
    return build_segmenter(build_vit(TINY), config, seed=0)


def shaken(module: nn.Module) -> nn.Module:
    """The module with batch norms that do something."""
    for inner in module.modules():
        if isinstance(inner, nn.BatchNorm2d):
            for tensor in (inner.weight, inner.bias, inner.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(inner.running_var, 0.5, 2)
    return module


def plain(x: torch.Tensor, block: nn.Sequential) -> torch.Tensor:
    conv, norm = (m for m in block if isinstance(m, nn.Conv2d | nn.BatchNorm2d))
    assert conv.bias is None
    x = F.conv2d(x, conv.weight, padding=conv.weight.shape[-1] // 2)
    x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    return (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)


def up(x: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


def test_upernet_is_its_pieces() -> None:
    torch.manual_seed(1)
    head = shaken(UPerHead(6, 4, 3, dropout=0.1)).eval()
    a, b, c, d = (torch.randn(2, 6, size, size) for size in (16, 8, 4, 2))
    pooled = [
        up(plain(F.adaptive_avg_pool2d(d, s), p), 2)
        for s, p in zip((1, 2, 3, 6), head.pools, strict=True)
    ]
    top = plain(torch.cat([d, *pooled], dim=1), head.bottleneck)
    third = plain(c, head.laterals[2]) + up(top, 4)
    second = plain(b, head.laterals[1]) + up(third, 8)
    first = plain(a, head.laterals[0]) + up(second, 16)
    levels = [plain(x, out) for x, out in zip((first, second, third), head.outputs, strict=True)]
    fused = plain(
        torch.cat([up(x, 16) for x in (*levels, top)], dim=1), head.fuse
    )  # no convolution on the top
    classifier = head.classifier[1]
    want = (
        torch.einsum("nchw,kc->nkhw", fused, classifier.weight[:, :, 0, 0])
        + classifier.bias[:, None, None]
    )
    torch.testing.assert_close(head([a, b, c, d]), want, rtol=1e-4, atol=1e-5)


def test_semantic_fpn_is_its_pieces() -> None:
    """Each map by 3x3 convolutions and doublings to the finest size, all summed."""
    torch.manual_seed(2)
    net = shaken(segmenter("semantic_fpn", channels=3)).eval()
    for layer in net.fpn.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias)
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        a, b, c, d = net.backbone(images)
        # The FPN: 1x1, nearest neighbors from above, 3x3, all with bias and without norm.
        laterals = [
            F.conv2d(x, block[0].weight, block[0].bias)
            for x, block in zip((a, b, c, d), net.fpn.inner_blocks, strict=True)
        ]
        for level in (2, 1, 0):
            above = laterals[level + 1].repeat_interleave(2, 2).repeat_interleave(2, 3)
            laterals[level] = laterals[level] + above
        a, b, c, d = (
            F.conv2d(x, block[0].weight, block[0].bias, padding=1)
            for x, block in zip(laterals, net.fpn.layer_blocks, strict=True)
        )
        total = plain(a, net.head.scales[0][0])
        for x, scale, doublings in zip((b, c, d), net.head.scales[1:], (1, 2, 3), strict=True):
            for number in range(doublings):
                x = plain(x, scale[2 * number])
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            total = total + x
        classifier = net.head.classifier[1]
        want = F.conv2d(total, classifier.weight, classifier.bias)
        assert total.shape == (2, 3, 16, 24) and c.shape[1] == 6
        torch.testing.assert_close(net(images)[0], want, rtol=1e-4, atol=1e-4)


def test_semantic_fpn_of_odd_maps() -> None:
    """The coarsest of 3 x 5 patches is 1 x 2: it is stretched to the finest, which is 12 x 20."""
    net = segmenter("semantic_fpn", channels=3).eval()
    assert net(torch.randn(1, 3, 24, 40))[0].shape == (1, 5, 6 * 2, 10 * 2)


def test_semantic_fpn_of_the_protocol() -> None:
    """256 channels in the FPN and 128 in the head, counted by hand; the loss of one head."""
    config = SegmenterConfig(variant="semantic_fpn", taps="2-5-8-11")
    vit = build_vit("vit_s16_h8")
    with torch.device("meta"):
        net = SemanticFPN(vit, config)
    assert net.backbone.blocks == (2, 5, 8, 11)
    fpn = 4 * (384 * 256 + 256) + 4 * (9 * 256 * 256 + 256)
    head = 4 * 9 * 256 * 128 + 3 * 9 * 128 * 128 + 7 * 2 * 128 + 128 * 150 + 150
    assert sum(p.numel() for part in (net.fpn, net.head) for p in part.parameters()) == fpn + head
    assert net.weights == (1.0,) and net.head.classifier[0].rate == 0.1


def test_auxiliary_head_sees_the_third_map() -> None:
    net = shaken(segmenter("upernet"))
    images = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        maps = net.eval().backbone(images)
        hidden = plain(maps[2], net.auxiliary)
        classifier = net.auxiliary[-1][1]
        want = F.conv2d(hidden, classifier.weight, classifier.bias)
        torch.testing.assert_close(net.auxiliary(maps[2]), want)
        assert [tuple(x.shape) for x in net.train()(images)] == [(2, 5, 16, 32), (2, 5, 4, 8)]
        assert len(net.eval()(images)) == 1  # not computed for nothing


def test_widths_and_parameters_of_the_specification() -> None:
    config = SegmenterConfig(variant="upernet", num_classes=150)
    vit = build_vit("vit_s16")
    with torch.device("meta"):
        net = UPerNet(vit, config)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert net.head.fuse[0].weight.shape == (384, 4 * 384, 3, 3)
    assert net.auxiliary[0].weight.shape == (256, 384, 3, 3)
    assert millions == pytest.approx(41.7, abs=0.6)  # with the position table of 224 pixels
    assert count_segmenter_flops(net, 512) / 3 == pytest.approx(
        315e9, rel=0.02
    )  # as another implementation counted


def test_linear_variant_is_a_frozen_vit_and_one_layer() -> None:
    net = shaken(segmenter("linear")).eval()
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {
        "head.1.weight",
        "head.1.bias",
    }
    images = torch.randn(2, 3, 32, 32)
    x, maps = net.backbone.vit._pos_embed(net.backbone.vit.patch_embed(images)), []
    for block in net.backbone.vit.blocks:
        x = block(x)
        maps.append(net.backbone.vit.norm(x)[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    four = torch.cat([maps[i] for i in (1, 1, 2, 3)], dim=1)
    classifier = net.head[1]
    torch.testing.assert_close(net(images)[0], F.conv2d(four, classifier.weight, classifier.bias))


def test_void_pixels_count_in_the_divisor() -> None:
    """Uniform logits over ten classes on a map one quarter void: 0.75 ln 10 = 1.73, where a plain
    mean gives 2.31.
    """
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, :4, :4] = 255
    logits = torch.zeros(1, 10, 4, 4)
    assert pixel_loss(logits, labels).item() == pytest.approx(0.75 * math.log(10), rel=1e-6)
    assert F.cross_entropy(
        torch.zeros(1, 10, 8, 8), labels, ignore_index=255
    ).item() == pytest.approx(2.3026, abs=1e-4)


def test_loss_is_taken_at_the_size_of_the_labels() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 3, 3), torch.randint(0, 4, (2, 9, 9))
    labels[0, :, 2] = 255
    full = F.interpolate(logits, size=(9, 9), mode="bilinear")
    total = 0.0
    for n in range(2):
        for y in range(9):
            for x in range(9):
                if labels[n, y, x] != 255:
                    total += (full[n, :, y, x].logsumexp(0) - full[n, labels[n, y, x], y, x]).item()
    assert pixel_loss(logits, labels).item() == pytest.approx(total / 162, rel=1e-5)


@pytest.mark.parametrize("variant", ["upernet", "linear", "semantic_fpn"])
def test_an_all_void_crop_costs_nothing_and_reaches_every_parameter(variant: str) -> None:
    net = segmenter(variant)
    labels = torch.full((2, 32, 32), 255)
    losses = net.loss(net(torch.randn(2, 3, 32, 32)), labels)
    total = sum(losses.values())
    total.backward()
    assert total.item() == 0
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() == 0, name


def test_weights_of_the_heads() -> None:
    net = segmenter("upernet")
    labels = torch.zeros(1, 32, 32, dtype=torch.int64)
    losses = net.loss([torch.zeros(1, 5, 8, 8), torch.zeros(1, 5, 4, 4)], labels)
    assert {n: round(v.item(), 4) for n, v in losses.items()} == {
        "decode": round(math.log(5), 4),
        "auxiliary": round(0.4 * math.log(5), 4),
    }


def test_channel_dropout() -> None:
    dropout = ChannelDropout(3, 0.25)
    x = torch.ones(2, 3, 2, 2)
    assert torch.equal(dropout(x), x)
    dropout.uniform = torch.tensor([[0.1, 0.8, 0.7], [0.74, 0.75, 0.0]])
    kept = torch.tensor([[1.0, 0, 1], [1, 0, 1]]) / 0.75
    torch.testing.assert_close(dropout(x), kept[:, :, None, None].expand_as(x))


def test_draws_are_those_of_the_global_batch() -> None:
    net = segmenter("upernet", dropout=0.5)
    net.backbone.vit.blocks[-1].drop_path1.rate = 0.5
    images = torch.randn(4, 3, 32, 32)

    def outputs(mine: slice) -> torch.Tensor:
        net.set_draws(3, 7, 4, mine, torch.device("cpu"))
        net.eval()
        return net(images[mine])[0]

    whole = outputs(slice(0, 4))
    torch.testing.assert_close(outputs(slice(2, 4)), whole[2:])
    net.clear_draws()
    assert not torch.allclose(net(images)[0], whole)


def test_patches_that_are_not_whole_are_not_seen() -> None:
    """Logits of the whole patches are stretched over the image."""
    net = shaken(segmenter("upernet")).eval()
    image = torch.randn(1, 3, 33, 50)
    want = F.interpolate(net(image[:, :, :32, :48])[0], size=(33, 50), mode="bilinear")
    torch.testing.assert_close(net.logits(image), want)


@pytest.mark.parametrize(
    ("length", "expected"), [(512, [0]), (683, [0, 171]), (1024, [0, 341, 512]), (300, [0])]
)
def test_windows(length: int, expected: list[int]) -> None:
    assert window_starts(length, 512, 341) == expected


@pytest.mark.parametrize("size", [(20, 31), (8, 8), (5, 40), (3, 4)])
def test_slide_is_the_mean_over_windows(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image, weights = torch.randn(3, *size), torch.randn(4, 3)

    def logits(windows: torch.Tensor) -> torch.Tensor:
        """Depends on the place in the window, so that overlaps matter."""
        place = torch.arange(windows.shape[-1]) + 10.0 * torch.arange(windows.shape[-2])[:, None]
        return torch.einsum("kc,nchw->nkhw", weights, windows) * place

    height, width = size
    want = torch.zeros(4, height, width)
    for y in range(height):
        for x in range(width):
            values = []
            for top in sorted({min(t, max(height - 8, 0)) for t in range(0, height, 5)}):
                for left in sorted({min(t, max(width - 8, 0)) for t in range(0, width, 5)}):
                    if top <= y < top + 8 and left <= x < left + 8:
                        values.append(
                            logits(image[None, :, top : top + 8, left : left + 8])[
                                0, :, y - top, x - left
                            ]
                        )
            want[:, y, x] = torch.stack(values).mean(dim=0)
    torch.testing.assert_close(
        slide_windows(logits, image, num_classes=4, window=8, stride=5, at_once=3), want
    )


def test_label_map_is_the_arg_max_of_the_resized_logits() -> None:
    logits = torch.randn(37, 6, 9, generator=torch.Generator().manual_seed(0))
    want = F.interpolate(logits[None], size=(13, 10), mode="bilinear")[0].argmax(dim=0)
    assert torch.equal(argmax_at_size(logits, 13, 10), want)


def test_scores_by_hand() -> None:
    """Classes 0, 1 and 4 occur, 2 is only predicted, 3 and 5 are neither; void pixels count
    nowhere.
    """
    labels = torch.tensor([[0, 0, 0, 1], [1, 4, 255, 255]])
    predicted = torch.tensor([[0, 0, 2, 0], [1, 4, 0, 3]])
    counts = count_confusion(predicted, labels, 6)
    assert counts.sum() == 6 and counts[0].tolist() == [2, 0, 1, 0, 0, 0]
    got = compute_scores(counts)
    want = SegmentationScores(
        miou=100 * (2 / 4 + 1 / 2 + 0 + 1) / 4, macc=100 * (2 / 3 + 1 / 2 + 1) / 3, aacc=100 * 4 / 6
    )
    assert (got.miou, got.macc, got.aacc) == pytest.approx((want.miou, want.macc, want.aacc))


def test_scores_against_sets_of_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (4, 30, 30), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    predicted = torch.randint(0, 4, labels.shape, generator=generator)
    ious = []
    for k in range(5):
        mine, theirs = (predicted == k) & (labels != 255), labels == k
        ious.append((mine & theirs).sum().item() / (mine | theirs).sum().item())
    total = sum(count_confusion(p, t, 5) for p, t in zip(predicted, labels, strict=True))
    assert compute_scores(total).miou == pytest.approx(100 * sum(ious) / 5)
    assert torch.equal(total, count_confusion(predicted, labels, 5))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([[7, 255]]), "label 7 in a label map of 5 classes"),
        (torch.zeros(2, 3), r"\(1, 2\) and label map \(2, 3\)"),
    ],
)
def test_confusion_names_what_does_not_fit(labels: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        count_confusion(torch.zeros(1, 2), labels, 5)
