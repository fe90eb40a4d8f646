"""Schedules, layer-wise groups, mixing, batches and views of fine-tuning against closed forms and
timm.
"""

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from PIL import Image
from timm.data.auto_augment import RandAugment
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.mixup import Mixup
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler

from mugs.data.sources.folder import FolderSource
from mugs.finetune.batches import (
    AugmentedViews,
    BatchSampler,
    ViewRequest,
    build_training_transform,
    load_batches,
    posterize,
)
from mugs.finetune.classifier import ImageClassifier, build_head, build_parameter_groups
from mugs.finetune.config import FinetuneConfig, HeadOptions, ImageOptions, MixOptions, RateOptions
from mugs.finetune.mixing import (
    MixDraw,
    assign_columns,
    draw_mix,
    mix_batch,
    smooth_labels,
    soft_cross_entropy,
)
from mugs.finetune.schedules import FinetuneSchedule
from mugs.models.config import ViTConfig
from mugs.models.vit import build_vit
from pipeline.identity import science_fields

STEP = {  # ImageNet fine-tuning: epochs, steps per epoch, warm-up, peak
    "s": (200, 1251, 20, 1.2e-3),
    "b": (100, 1251, 20, 1.2e-3),
    "l": (50, 1251, 5, 8e-4),
    "l_script": (50, 2502, 5, 8e-4),
}
EPOCH = {  # semi-supervised and transfer: epochs, base rate, batch
    "1pct": (1000, 5e-6, 512),
    "10pct": (1000, 5e-6, 1024),
    "cifar10_s": (1000, 3e-6, 768),
    "cifar100_s": (1000, 7.5e-6, 768),
    "inat18_s": (360, 3e-5, 768),
    "inat19_s": (360, 7.5e-5, 768),
    "cars": (1000, 1.5e-4, 768),
}


@pytest.mark.parametrize("name", STEP)
def test_rate_per_step(name: str) -> None:
    epochs, steps, warm, peak = STEP[name]
    rate = RateOptions(base_lr=peak, unit="step", warmup_epochs=warm, min_lr=1e-6)
    schedule = FinetuneSchedule(FinetuneConfig(epochs=epochs, batch_size=1024, rate=rate), steps)
    rest = np.arange((epochs - warm) * steps)
    cosine = 1e-6 + 0.5 * (peak - 1e-6) * (1 + np.cos(np.pi * rest / len(rest)))
    expected = np.concatenate([np.linspace(0, peak, warm * steps), cosine])
    assert schedule.total_steps == len(expected)
    np.testing.assert_allclose(
        [schedule.lr(i) for i in range(len(expected))], expected, rtol=1e-9, atol=1e-18
    )
    assert schedule.wd(7) == 0.05


@pytest.mark.parametrize("lag", [True, False])
@pytest.mark.parametrize("name", EPOCH)
def test_rate_per_epoch_is_that_of_timm(name: str, lag: bool) -> None:
    epochs, base, batch = EPOCH[name]
    rate = RateOptions(
        base_lr=base, lr_batch=512, unit="epoch", warmup_lr=1e-6, min_lr=1e-5, epoch_lag=lag
    )
    config = FinetuneConfig(epochs=epochs, batch_size=batch, rate=rate)
    schedule = FinetuneSchedule(config, 3)
    peak = base * batch / 512
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=epochs, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6
    )
    for epoch in range(epochs):
        if not lag:
            scheduler.step(epoch)
        expected = optimizer.param_groups[0]["lr"]
        assert [schedule.lr(3 * epoch + i) for i in range(3)] == pytest.approx(
            [expected] * 3, rel=1e-12
        )
        scheduler.step(epoch)  # with the finished epoch's number, as released


def test_odd_rates() -> None:
    rate = RateOptions(base_lr=5e-6, lr_batch=512, unit="epoch", warmup_lr=1e-6, min_lr=1e-5)
    one = FinetuneSchedule(FinetuneConfig(epochs=1000, batch_size=512, rate=rate), 25)
    assert one.lr(0) == one.lr(49) == 1e-6 < one.lr(50)  # epochs 0 and 1 are the same
    rates = [one.lr(25 * e) for e in range(6, 1000)]
    assert all(a < b for a, b in itertools.pairwise(rates)) and rates[-1] == pytest.approx(
        1e-5, rel=1e-4
    )
    ten = FinetuneSchedule(FinetuneConfig(epochs=1000, batch_size=1024, rate=rate), 125)
    assert {round(ten.lr(125 * e), 15) for e in range(6, 1000)} == {1e-5}


def small(depth: int = 12) -> ImageClassifier:
    vit = build_vit(
        ViTConfig(embed_dim=12, depth=depth, num_heads=2, patch_size=8, image_size=32),
        drop_path=0.2,
    )
    return ImageClassifier(vit, build_head(HeadOptions(), 12, 5, seed=1))


def test_every_group_is_listed() -> None:
    """Levels, scales and members, written out by hand for depth 2."""
    model = small(depth=2)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {
        (g["lr_scale"], g["decay"]): sorted(names[id(p)] for p in g["params"])
        for g in build_parameter_groups(model, 0.5)
    }
    weights, biases = ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2"), ("norm1.bias", "norm2.bias")

    def block(i: int) -> dict[tuple[float, bool], list[str]]:
        scale, at = 0.5 ** (2 - i), f"backbone.blocks.{i}."
        norms = [at + n for n in (*biases, "norm1.weight", "norm2.weight")]
        return {
            (scale, True): [f"{at}{w}.weight" for w in weights],
            (scale, False): sorted([f"{at}{w}.bias" for w in weights] + norms),
        }

    stem = ["backbone.cls_token", "backbone.patch_embed.proj.bias", "backbone.pos_embed"]
    assert found == {
        (0.125, True): ["backbone.patch_embed.proj.weight"],
        (0.125, False): stem,
        **block(0),
        **block(1),
        (1.0, True): ["head.weight"],
        (1.0, False): ["backbone.norm.bias", "backbone.norm.weight", "head.bias"],
    }


@pytest.mark.parametrize("decay_tokens", [False, True])
@pytest.mark.parametrize(("depth", "decay"), [(12, 0.55), (24, 0.65), (24, 0.75)])
def test_groups_equal_those_of_timm(depth: int, decay: float, decay_tokens: bool) -> None:
    """Scale and decay of every parameter; timm counts the final norm to the last block, the recipe
    to the head.
    """
    theirs = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=12, depth=depth, num_heads=2, num_classes=5
    )
    model = small(depth)
    names = {id(p): n for n, p in theirs.named_parameters()}
    skip = () if decay_tokens else theirs.no_weight_decay()
    groups = param_groups_layer_decay(theirs, 0.05, no_weight_decay_list=skip, layer_decay=decay)
    expected = {
        names[id(p)]: (g["lr_scale"], g["weight_decay"] > 0) for g in groups for p in g["params"]
    }
    for norm in ("norm.weight", "norm.bias"):
        assert expected[norm] == (decay, False)
        expected[norm] = (1.0, False)
    names = {id(p): n.removeprefix("backbone.") for n, p in model.named_parameters()}
    ours = {
        names[id(p)]: (g["lr_scale"], g["decay"])
        for g in build_parameter_groups(model, decay, decay_tokens=decay_tokens)
        for p in g["params"]
    }
    assert ours == expected
    assert min(s for s, _ in ours.values()) == decay ** (depth + 1)


def test_size_of_the_released_log() -> None:
    model = ImageClassifier(build_vit("vit_s16"), build_head(HeadOptions(), 384, 1000, seed=0))
    assert sum(p.numel() for p in model.parameters()) == 22_050_664


def test_heads() -> None:
    linear, mlp = (
        build_head(HeadOptions(kind=k, hidden=64), 384, 10, seed=3) for k in ("linear", "mlp")
    )
    assert [tuple(p.shape) for p in mlp.parameters()] == [(64, 384), (64,), (10, 64), (10,)]
    assert isinstance(mlp[1], torch.nn.GELU)
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and not linear.bias.any()
    scaled = build_head(HeadOptions(scale=0.001), 384, 10, seed=3)
    assert torch.equal(scaled.weight, linear.weight * 0.001)
    assert not torch.equal(build_head(HeadOptions(), 384, 10, seed=4).weight, linear.weight)


def box_of_old_timm(
    shape: tuple[int, ...], share: float, margin: float = 0.0, count: int | None = None
) -> tuple[int, ...]:
    """Return the box of timm 0.4.5, for a margin of 0."""
    assert margin == 0.0 and count is None
    sides = [int(side * np.sqrt(1 - share)) for side in shape[-2:]]
    centers = [np.random.randint(0, side) for side in shape[-2:]]
    return tuple(
        int(np.clip(center + half, 0, side))
        for center, cut, side in zip(centers, sides, shape[-2:], strict=True)
        for half in (-(cut // 2), cut // 2)
    )


@pytest.mark.parametrize(
    ("mixup", "cutmix", "box"),
    [(0.8, 1.0, "released"), (0.8, 1.0, "timm"), (0.8, 0.0, "released"), (0.0, 1.0, "released")],
)
def test_mixing_is_that_of_timm(
    mixup: float, cutmix: float, box: Literal["released", "timm"], monkeypatch: pytest.MonkeyPatch
) -> None:
    if box == "timm" and Version(timm.__version__) < Version("1.0.31"):
        pytest.skip("older timm draws boxes of odd sides one pixel shorter")
    if box == "released":
        monkeypatch.setattr("timm.data.mixup.rand_bbox", box_of_old_timm)
    options = MixOptions(mixup=mixup, cutmix=cutmix, prob=0.9, cutmix_box=box)
    images, labels = torch.randn(6, 3, 20, 14), torch.tensor([0, 1, 2, 3, 4, 0])
    theirs = Mixup(mixup, cutmix, prob=0.9, switch_prob=0.5, label_smoothing=0.1, num_classes=5)
    columns = assign_columns(6, options, 1, 0)
    assert columns.tolist() == [0, 1, 2, 5, 4, 3]
    boxes = 0
    for step in range(12):
        targets = smooth_labels(labels[columns], 5, 0.1)
        mixed, target = mix_batch(
            images[columns], targets, np.zeros(6, int), options, seed=3, step=step
        )
        np.random.seed(np.random.SeedSequence([3, step, 0]).generate_state(4))
        expected, expected_target = theirs(images.clone(), labels)
        torch.testing.assert_close(mixed, expected[columns])
        torch.testing.assert_close(target, expected_target[columns])
        boxes += draw_mix(options, 3, step, 0, 20, 14).box is not None
    assert {(0.8, 1.0): 0 < boxes < 12, (0.8, 0.0): boxes == 0, (0.0, 1.0): boxes > 8}[
        mixup, cutmix
    ]


def test_boxes_of_odd_sides_are_a_pixel_short_as_released() -> None:
    """Boxes that timm 0.4.5 drew; today's are a pixel longer where a side is odd."""
    drawn = [
        [draw_mix(MixOptions(cutmix_box=box), 3, step, 0, 224, 224).box for step in range(300)]
        for box in ("released", "timm")
    ]
    pairs = [(ours, theirs) for ours, theirs in zip(*drawn, strict=True) if ours and theirs]
    longer = [np.subtract(theirs, ours).tolist() for ours, theirs in pairs]
    assert {tuple(row) for row in longer} == {(0, b, 0, r) for b in (0, 1) for r in (0, 1)}
    # Boxes are square, so sides are odd together; at the border of the image nothing is added.
    assert 0.3 < np.mean([any(row) for row in longer]) < 0.6


def test_the_kind_of_box_is_refused_where_none_is_cut() -> None:
    for off in ({"cutmix": 0.0}, {"prob": 0.0}, {"switch_prob": 0.0}):
        with pytest.raises(ValueError, match="no effect without cutmix"):
            MixOptions(cutmix_box="timm", **off)
        assert "cutmix_box" not in science_fields(MixOptions(**off))
    assert science_fields(MixOptions())["cutmix_box"] == "released"


def test_nothing_is_mixed_at_probability_0() -> None:
    options = MixOptions(prob=0.0)
    assert draw_mix(options, 0, 1, 2, 8, 12) == MixDraw(1.0) and not options.on
    assert assign_columns(6, options, 2, 1).tolist() == [3, 4, 5], "an odd share need not pair"


def test_soft_cross_entropy_is_label_smoothing() -> None:
    logits, labels = torch.randn(7, 5), torch.randint(5, (7,))
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(soft_cross_entropy(logits, smooth_labels(labels, 5, 0.1)), expected)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_columns_cover_the_batch_and_keep_pairs_together(world: int) -> None:
    options = MixOptions(group=8)
    mine = [assign_columns(32, options, world, rank) for rank in range(world)]
    assert sorted(np.concatenate(mine).tolist()) == list(range(32))
    for columns in mine:
        first, second = np.split(columns, 2)
        assert (first % 4 == second % 4).all()  # one group
        assert (first // 4 + second // 4 == 7).all()  # mirrored in it
    if world == 4:  # as the released sampler deals them to four GPUs of eight
        assert [sorted(c.tolist()) for c in mine] == [list(range(rank, 32, 4)) for rank in range(4)]


@pytest.mark.parametrize(
    ("batch", "group", "world", "words"), [(12, 5, 1, "even divisor"), (12, None, 4, "in pairs")]
)
def test_batches_that_cannot_be_mixed(
    batch: int, group: int | None, world: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        assign_columns(batch, MixOptions(group=group), world, 0)
    assert len(assign_columns(batch, MixOptions(prob=0), world, 0)) == batch // world


def test_batches_without_and_with_repeats() -> None:
    plain = BatchSampler(50, seed=1, batch_size=16, repeats=1)
    assert plain.steps_per_epoch == 3
    drawn = [d for step in range(3) for d in plain.view_requests(step, np.arange(16))]
    assert len({d.sample for d in drawn}) == 48 and {(d.epoch, d.copy) for d in drawn} == {(0, 0)}
    assert [d.sample for d in plain.view_requests(3, np.arange(16))] != [
        d.sample for d in drawn[:16]
    ]
    thrice = BatchSampler(600, seed=1, batch_size=64, repeats=3)
    assert thrice.steps_per_epoch == 512 // 64
    drawn = [d for step in range(8) for d in thrice.view_requests(step, np.arange(64))]
    assert [d.copy for d in drawn[:7]] == [0, 1, 2, 0, 1, 2, 0]
    assert len({(d.sample, d.copy) for d in drawn}) == 512 and len({d.sample for d in drawn}) == 171
    for num, repeats, words in (
        (10, 1, "exceeds the data set's 10 images$"),
        (300, 3, "256 with repeats 3"),
    ):
        with pytest.raises(ValueError, match=words):
            BatchSampler(num, seed=1, batch_size=290, repeats=repeats)


def test_repeats_are_dealt_as_by_the_sampler_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs of 64: the same images on each in each step, copies of an image on different
    ones.
    """
    batches = BatchSampler(1000, seed=1, batch_size=256, repeats=3)
    monkeypatch.setattr(batches.order, "permutation", lambda epoch: np.arange(1000))
    assert batches.steps_per_epoch == 3
    for rank in range(4):
        theirs = list(
            RepeatAugSampler(range(1000), num_replicas=4, rank=rank, shuffle=False, num_repeats=3)
        )
        assert len(theirs) == 192
        columns = assign_columns(256, MixOptions(group=64), 4, rank)
        for step in range(3):
            drawn = batches.view_requests(step, columns)
            assert sorted(d.sample for d in drawn) == sorted(theirs[64 * step : 64 * (step + 1)])
            assert len({d.sample for d in drawn}) == 64


def test_posterize_to_nothing_is_black() -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    assert not np.asarray(posterize(image, 0)).any()
    assert np.asarray(posterize(image, 1)).max() == 128
    stages = build_training_transform(ImageOptions(randaugment="rand-m10-n15-p1.0-inc1")).transforms
    augment = next(stage for stage in stages if isinstance(stage, RandAugment))
    for operation in augment.ops:
        assert operation(image).size == (4, 4)  # at magnitude 10, where Posterize keeps no bits


def test_the_transform_is_the_recipe() -> None:
    """Crop 0.08 to 1 bicubic, flip, RandAugment with replacement, no jitter, normalize, erase by
    pixel.
    """
    stages = build_training_transform(ImageOptions()).transforms
    kinds = [type(s).__name__ for s in stages]
    assert kinds == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    crop, flip, augment, _, _, erasing = stages
    assert (crop.size, crop.scale, crop.interpolation.value) == ((224, 224), (0.08, 1.0), "bicubic")
    assert (
        flip.p == 0.5
        and augment.num_layers == 2
        and augment.choice_weights is None
        and len(augment.ops) == 15
    )
    assert {(o.magnitude, o.magnitude_std, o.prob) for o in augment.ops} == {(9, 0.5, 0.5)}
    assert augment.ops[4].name == "PosterizeIncreasing" and augment.ops[0].hparams["img_mean"] == (
        124,
        116,
        104,
    )
    assert (erasing.probability, erasing.per_pixel, erasing.max_count, erasing.max_area) == (
        0.25,
        True,
        1,
        1 / 3,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(6):
            pixels = np.random.default_rng([ord(label), i]).integers(
                0, 255, (40, 50, 3), dtype=np.uint8
            )
            Image.fromarray(pixels).save(tmp_path / label / f"{i}.png")
    return tmp_path


def loaded(folder: Path, options: ImageOptions, workers: int, seed: int = 0) -> list[Any]:
    views, batches = (
        AugmentedViews(FolderSource(folder), options, seed),
        BatchSampler(12, seed=0, batch_size=4, repeats=1),
    )
    return list(load_batches(views, batches, np.arange(4), 2, 5, workers))


def test_views_depend_on_neither_worker_nor_global_state(folder: Path) -> None:
    options = ImageOptions(size=16, resize=16)
    one = loaded(folder, options, workers=0)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = random.getstate()[1], torch.get_rng_state()
    AugmentedViews(FolderSource(folder), options, 0)(ViewRequest(0, 1, 0))
    assert before[0] == random.getstate()[1] and torch.equal(before[1], torch.get_rng_state())
    two = loaded(folder, options, workers=2)
    assert len(one) == 3
    for a, b in zip(one, two, strict=True):
        assert (
            torch.equal(a.images, b.images)
            and torch.equal(a.labels, b.labels)
            and torch.equal(a.ids, b.ids)
        )
        assert a.labels.tolist() == [i // 6 for i in a.ids.tolist()]


def test_views_differ_by_each_of_their_keys(folder: Path) -> None:
    options = ImageOptions(size=16, resize=16)
    views = AugmentedViews(FolderSource(folder), options, 0)

    def view(maker: AugmentedViews, *key: int) -> torch.Tensor:
        return maker(ViewRequest(*key))[0]

    base = view(views, 0, 1, 0)
    assert torch.equal(base, view(views, 0, 1, 0))
    for other in (view(views, 1, 1, 0), view(views, 0, 2, 0), view(views, 0, 1, 1)):
        assert not torch.equal(base, other)
    assert not torch.equal(base, view(AugmentedViews(FolderSource(folder), options, 1), 0, 1, 0))


@pytest.mark.parametrize(
    "change",
    [
        {"scale": (0.9, 1.0)},
        {"flip_prob": 0.0},
        {"randaugment": ""},
        {"erase_prob": 0.0},
        {"size": 8},
    ],
)
def test_every_image_option_has_an_effect(folder: Path, change: dict[str, Any]) -> None:
    options = ImageOptions(size=16, resize=16)
    one, other = loaded(folder, options, 0), loaded(folder, replace(options, **change), 0)
    assert not all(torch.equal(a.images, b.images) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named(folder: Path, workers: int) -> None:
    for path in (folder / "a").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a/\d\.png: not an image") as caught:
        loaded(folder, ImageOptions(size=16), workers)
    assert "\n" not in str(caught.value)


def test_rate_is_scaled_with_the_batch_or_not() -> None:
    plain = FinetuneConfig(epochs=1, batch_size=768, rate=RateOptions(base_lr=3e-6))
    assert plain.peak_lr == 3e-6
    assert replace(plain, rate=RateOptions(base_lr=3e-6, lr_batch=512)).peak_lr == pytest.approx(
        4.5e-6
    )
