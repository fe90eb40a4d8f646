"""Fine-tuning against a plain loop; resumed, over two ranks, in micro-batches; a bad step; every
option counts.
"""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import spawn
from stopping import StopAfter, StoppedError
from torch import Tensor

from mugs import distributed
from mugs.data.loading.evaluation import iter_eval_batches
from mugs.data.mini.digits import materialize_digits
from mugs.data.sources.decode import decode_rgb
from mugs.data.sources.folder import FolderSource
from mugs.data.views.config import IMAGENET_MEAN, IMAGENET_STD
from mugs.engine.failures import NonFiniteError
from mugs.finetune import train as train_module
from mugs.finetune.batches import AugmentedViews, BatchSampler
from mugs.finetune.classifier import ImageClassifier, build_head
from mugs.finetune.config import FinetuneConfig, HeadOptions, ImageOptions, MixOptions, RateOptions
from mugs.finetune.mixing import assign_columns, mix_batch, smooth_labels
from mugs.finetune.train import EpochAccuracy, Finetuning
from mugs.models.config import ViTConfig
from mugs.models.stochastic_depth import draw_depth_uniforms
from mugs.models.vit import build_vit

CPU = torch.device("cpu")
SHAPE = ViTConfig(embed_dim=16, depth=2, num_heads=2, patch_size=8, image_size=16)
CONFIG = FinetuneConfig(
    epochs=3,
    batch_size=16,
    rate=RateOptions(base_lr=5e-3, warmup_epochs=1),
    images=ImageOptions(size=16, resize=16, scale=(0.5, 1.0)),
    mix=MixOptions(group=8),
    layer_decay=0.7,
    seed=3,
    workers=0,
    checkpoint_steps=4,
    log_steps=1,
)


class Few:
    """Every seventh image of the digits: 51, three batches of 16."""

    def __init__(self, root: Path) -> None:
        self.whole = FolderSource(root)
        self.classes, self.chosen = self.whole.classes, list(range(0, len(self.whole), 7))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getattr__(self, name: str) -> Callable[[int], Any]:
        return lambda index: getattr(self.whole, name)(self.chosen[index])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("digits") / "digits"
    materialize_digits(root)
    return root / "val"


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights of the plain run."""
    return run(tmp_path_factory.mktemp("base"), data)[0]


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """To 1e-5, but for key biases: their gradient is zero up to rounding, which AdamW blows up to
    any size.
    """
    for name, value in theirs.items():
        keep = torch.ones(len(value) if value.ndim else 1, dtype=torch.bool)
        if name.endswith("qkv.bias"):
            keep[16:32] = False
        torch.testing.assert_close(
            ours[name][keep], value[keep], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def model(drop_path: float = 0.2, head: HeadOptions | None = None) -> ImageClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = build_vit(SHAPE, drop_path=drop_path)
    return ImageClassifier(vit, build_head(head or HeadOptions(), 16, 10, seed=1))


def run(
    folder: Path, data: Path, config: FinetuneConfig = CONFIG
) -> tuple[dict[str, Tensor], list[EpochAccuracy]]:
    source = Few(data)
    classifier = model(head=config.head)
    task = Finetuning(classifier, (source, source), config, folder, CPU, num_classes=10)
    task.train()
    return {n: v.clone() for n, v in classifier.state_dict().items()}, task.history


def layer(name: str) -> int:
    """0 for the embeddings, 1 and 2 for the blocks, 3 for the rest."""
    if name.startswith("backbone.blocks."):
        return int(name.split(".")[2]) + 1
    return 3 if name.startswith(("backbone.norm.", "head.")) else 0


def test_ten_steps_of_a_plain_loop(tmp_path: Path, data: Path) -> None:
    """Per-sample views, mixing in groups of 8, stochastic depth, layer decay and AdamW spelled out
    with plain torch.
    """
    config = replace(CONFIG, epochs=4)
    ours, history = run(tmp_path / "run", data, config)
    plain, source = model(), Few(data)
    batches = BatchSampler(len(source), seed=3, batch_size=16, repeats=1)
    views, columns = AugmentedViews(source, config.images, 3), assign_columns(16, config.mix, 1, 0)
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(12):
        draws = [views(d) for d in batches.view_requests(step, columns)]
        images = torch.stack([d[0] for d in draws])
        targets = smooth_labels(torch.tensor([d[1] for d in draws]), 10, 0.1)
        images, targets = mix_batch(images, targets, columns % 2, config.mix, seed=3, step=step)
        depth = draw_depth_uniforms(3, step, branches=4, crops=1, batch_size=16)[:, 0, columns]
        plain.backbone.set_depth_uniforms(depth)
        loss = torch.nn.functional.cross_entropy(plain(images), targets)
        plain.zero_grad()
        loss.backward()
        warm = (
            5e-3 * step / 2
            if step < 3
            else 1e-6 + (5e-3 - 1e-6) * (1 + np.cos(np.pi * (step - 3) / 9)) / 2
        )
        with torch.no_grad():
            for name, p in plain.named_parameters():
                lr = warm * 0.7 ** (3 - layer(name))
                m, v = moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
                m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
                moments[name] = m, v
                if p.ndim > 1 and not name.endswith(("cls_token", "pos_embed")):
                    p.mul_(1 - lr * 0.05)
                p.sub_(
                    lr
                    * (m / (1 - 0.9 ** (step + 1)))
                    / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                )
    close(ours, dict(plain.state_dict()))
    moved = (plain.head.weight - model().head.weight).abs().max()
    assert moved > 0.01 and [r.epoch for r in history] == [0, 1, 2, 3]


def newest(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(
        (max((folder / "checkpoints").iterdir()) / "state.json").read_text()
    )
    return state


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_in_mid_epoch_bitwise(tmp_path: Path, data: Path, workers: int) -> None:
    config = replace(CONFIG, workers=workers)
    straight, history = run(tmp_path / "straight", data, config)
    run(tmp_path / "resumed", data, config)
    folder = tmp_path / "resumed" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000008", "step_00000009"]
    shutil.rmtree(
        folder / "step_00000009"
    )  # as if killed after step 8, the last but one of epoch 2
    resumed, again = run(tmp_path / "resumed", data, config)
    assert again == history and len(history) == 3
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    one, other = newest(tmp_path / "straight"), newest(tmp_path / "resumed")
    assert one["files"] == other["files"] and one["meta"] == other["meta"]


def test_asked_to_stop_it_saves_and_goes_on_later(
    tmp_path: Path, data: Path, base: dict[str, Tensor]
) -> None:
    source, config = Few(data), replace(CONFIG, workers=1, checkpoint_steps=99)
    with pytest.raises(StoppedError, match="5"):
        Finetuning(model(), (source, source), config, tmp_path, CPU, num_classes=10).train(
            StopAfter(5)
        )
    assert multiprocessing.active_children() == []
    again, _ = run(tmp_path, data, config)
    assert all(torch.equal(again[name], base[name]) for name in base)


def test_a_finished_run_returns_its_results(tmp_path: Path, data: Path) -> None:
    first, history = run(tmp_path, data)
    second, again = run(tmp_path, data)
    assert again == history and all(torch.equal(first[n], second[n]) for n in first)


def test_log(tmp_path: Path, data: Path) -> None:
    _, history = run(tmp_path, data)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(9)) and steps[0]["lr"] == 0
    assert {
        "images_per_second",
        "data_wait_share",
        "tflops",
        "peak_memory_mb",
        "weight_decay",
    } <= set(steps[0])
    found = [(line["epoch"], line["top1"], line["top5"]) for line in lines if "top1" in line]
    assert found == [(r.epoch, r.top1, r.top5) for r in history]
    assert json.loads((tmp_path / "progress.json").read_text())["done"] == 9


def test_validation_after_some_epochs_and_the_last(tmp_path: Path, data: Path) -> None:
    _, every = run(tmp_path / "every", data)
    _, some = run(tmp_path / "some", data, replace(CONFIG, validate_epochs=2))
    assert some == every[1:] and [r.epoch for r in some] == [1, 2]


def test_micro_batches_give_the_same_weights(
    tmp_path: Path, data: Path, base: dict[str, Tensor]
) -> None:
    close(run(tmp_path, data, replace(CONFIG, micro_batch_size=4))[0], base)


def test_bf16_learns_about_the_same(tmp_path: Path, data: Path, base: dict[str, Tensor]) -> None:
    rough, _ = run(tmp_path, data, replace(CONFIG, precision="bf16"))
    assert rough["head.weight"].dtype == torch.float32
    assert 0 < (base["head.weight"] - rough["head.weight"]).abs().max() < 0.02


@pytest.mark.parametrize(
    "change",
    [
        {"rate": replace(CONFIG.rate, base_lr=1e-3)},
        {"rate": replace(CONFIG.rate, lr_batch=8)},
        {"rate": replace(CONFIG.rate, warmup_epochs=2)},
        {"rate": replace(CONFIG.rate, warmup_lr=1e-3)},
        {"rate": replace(CONFIG.rate, min_lr=1e-3)},
        {"rate": replace(CONFIG.rate, unit="epoch")},
        {"mix": replace(CONFIG.mix, mixup=0.0)},
        {"mix": replace(CONFIG.mix, cutmix=0.0)},
        {"mix": replace(CONFIG.mix, prob=0.0)},
        {"mix": replace(CONFIG.mix, switch_prob=1.0)},
        {"mix": replace(CONFIG.mix, smoothing=0.0)},
        {"mix": replace(CONFIG.mix, group=16)},
        {"head": HeadOptions(scale=0.001)},
        {"images": replace(CONFIG.images, flip_prob=0.0)},
        {"weight_decay": 0.5},
        {"layer_decay": 1.0},
        {"seed": 4},
    ],
    ids=str,
)
def test_every_option_has_an_effect(
    tmp_path: Path, data: Path, base: dict[str, Tensor], change: dict[str, Any]
) -> None:
    other, _ = run(tmp_path, data, replace(CONFIG, **change))
    assert not torch.equal(base["head.weight"], other["head.weight"])


def test_lag_has_an_effect(tmp_path: Path, data: Path) -> None:
    rate = replace(CONFIG.rate, unit="epoch")
    lagging, _ = run(tmp_path / "lag", data, replace(CONFIG, rate=rate))
    prompt, _ = run(tmp_path / "prompt", data, replace(CONFIG, rate=replace(rate, epoch_lag=False)))
    assert not torch.equal(lagging["head.weight"], prompt["head.weight"])


def test_a_rising_rate_is_said(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rate = RateOptions(base_lr=1e-6, unit="epoch", warmup_epochs=0, min_lr=1e-5)
    run(tmp_path, data, replace(CONFIG, rate=rate, epochs=1))
    assert "min_lr 1e-05 exceeds the peak 1e-06: the rate rises" in caplog.text


def test_validation_resolution_and_interpolation(data: Path) -> None:
    source = Few(data)

    def views(resize: int, interpolation: Any) -> Tensor:
        return next(iter_eval_batches(source, resize=resize, crop=16, interpolation=interpolation))[
            0
        ]

    base = views(16, "bicubic")
    assert not torch.equal(base, views(24, "bicubic")) and not torch.equal(
        base, views(16, "bilinear")
    )
    image = decode_rgb(source.read(0), "")
    resized = image.resize((16, 40), Image.Resampling.BILINEAR).resize(
        (16, 16), Image.Resampling.BILINEAR
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(views(16, "bilinear")[0], (expected - mean) / std)


def poison(at: int) -> Callable[[], None]:
    """Make the loss of the given step NaN; returns what undoes it."""
    original, calls = train_module.soft_cross_entropy, [0]

    def poisoned(logits: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        return original(logits, targets) * (float("nan") if calls[0] == at + 1 else 1.0)

    train_module.soft_cross_entropy = poisoned

    def undo() -> None:
        train_module.soft_cross_entropy = original

    return undo


def check_bad_step(tmp_path: Path, data: Path, *, here: bool) -> None:
    """A bad step at 5 on one rank: stop, dump, and end as if nothing had happened."""
    straight, history = run(tmp_path / "straight", data)
    undo = poison(5) if here else lambda: None
    try:
        with pytest.raises(NonFiniteError, match="not finite at step 5"):
            run(tmp_path / "bad", data)
    finally:
        undo()
    rank = distributed.rank()
    dump = json.loads(
        (tmp_path / "bad" / "failures" / f"step_00000005_rank_{rank:04d}.json").read_text()
    )
    assert (
        len(dump["sample_ids"]) == 16 // distributed.world_size()
        and (dump["loss"] == "nan") == here
    )
    again, results = run(tmp_path / "bad", data)
    assert results == history and all(torch.equal(again[n], straight[n]) for n in straight)


def test_a_bad_step_harms_nothing(tmp_path: Path, data: Path) -> None:
    check_bad_step(tmp_path, data, here=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 64, "mix": MixOptions()}, "batch_size 64 exceeds the data set's 52 images"),
        ({"micro_batch_size": 5}, "16 images per rank do not divide into micro-batches of 5"),
        ({"mix": MixOptions(group=6)}, "mix.group 6: expected an even divisor of batch_size 16"),
        ({"repeats": 3}, "0 with repeats 3"),
    ],
)
def test_bad_settings_give_one_line(
    tmp_path: Path, data: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        run(tmp_path, data, replace(CONFIG, **change))
    assert "\n" not in str(caught.value)


def on_rank(rank: int, folder: Path, data: Path) -> None:
    weights, history = run(folder / "ranks", data)
    if rank == 0:
        torch.save((weights, [(r.epoch, r.top1, r.top5) for r in history]), folder / "ranks.pt")
    check_bad_step(folder, data, here=rank == 1)


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path, data: Path) -> None:
    spawn(on_rank, 2, tmp_path, data)
    weights, history = torch.load(tmp_path / "ranks.pt")
    one, results = run(tmp_path / "one", data)
    close(weights, one)
    assert history == [(r.epoch, r.top1, r.top5) for r in results]
