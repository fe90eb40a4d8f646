"""The fine-tuning stage: its options, the released recipes, refusals at plan time, and its rows."""

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mugs.data.mini.digits import materialize_digits
from mugs.data.sources.convert import convert_to_beton
from mugs.data.sources.folder import FolderSource
from mugs.finetune import config as engine
from mugs.finetune.batches import BatchSampler
from mugs.finetune.schedules import FinetuneSchedule
from mugs.models.config import ViTConfig
from mugs.models.vit import build_vit
from mugs.weights.backbone_file import read_backbone_file, write_backbone_file
from pipeline import config
from pipeline.manifest import DamagedError, hash_path
from pipeline.reading import validate_model
from pipeline.spec import ConfigError, Resources
from stages import finetune as stage
from stages.finetune import FinetuneStageConfig

RATE = {"base_lr": 1e-3}


# Written by hand from the recipe: epochs, batch, peak, lowest, warm-up, layer decay, drop path,
# weight decay, erasing.
# fmt: off
EXPECTED = {
    "imagenet_vit_s16": (200, 1024, 1.2e-3, 1e-6, 20, 0.55, 0.1, 0.05, 0.25),
    "imagenet_vit_b16": (100, 1024, 1.2e-3, 1e-6, 20, 0.55, 0.2, 0.05, 0.25),
    "imagenet_vit_l16": (50, 1024, 8e-4, 1e-6, 5, 0.65, 0.3, 0.05, 0.25),
    "imagenet_vit_l16_script": (50, 512, 8e-4, 1e-6, 5, 0.75, 0.3, 0.05, 0.25),
    "semi_1pct": (1000, 512, 5e-6, 1e-5, 5, 1.0, 0.1, 0.05, 0.25),
    "semi_10pct": (1000, 1024, 1e-5, 1e-5, 5, 1.0, 0.1, 0.05, 0.25),
    "cifar10_vit_s16": (1000, 768, 4.5e-6, 1e-5, 5, 1.0, 0.1, 0.05, 0.1),
    "cifar10_vit_b16": (1000, 768, 1.125e-5, 1e-5, 5, 1.0, 0.1, 0.05, 0.1),
    "cifar100_vit_s16": (1000, 768, 1.125e-5, 1e-5, 5, 1.0, 0.1, 0.02, 0.1),
    "cifar100_vit_b16": (1000, 768, 1.125e-5, 1e-5, 5, 1.0, 0.1, 0.05, 0.1),
    "inat18_vit_s16": (360, 768, 4.5e-5, 1e-5, 5, 1.0, 0.1, 0.05, 0.1),
    "inat18_vit_b16": (360, 768, 2.25e-5, 1e-5, 5, 1.0, 0.1, 0.05, 0.1),
    "inat19_vit_s16": (360, 768, 1.125e-4, 1e-5, 5, 1.0, 0.1, 0.05, 0.1),
    "inat19_vit_b16": (360, 768, 4.5e-5, 1e-5, 5, 1.0, 0.1, 0.05, 0.1),
    "flowers102_vit_s16": (1000, 768, 1.125e-4, 1e-5, 5, 1.0, 0.1, 0.05, 0.1),
    "flowers102_vit_b16": (1000, 768, 1.125e-4, 1e-5, 5, 1.0, 0.1, 0.05, 0.1),
    "cars_vit_s16": (1000, 768, 2.25e-4, 1e-5, 5, 1.0, 0.1, 0.05, 0.1),
    "cars_vit_b16": (1000, 768, 2.25e-4, 1e-5, 5, 1.0, 0.3, 0.05, 0.1),
}
GROUPS = {"imagenet_vit_s16": 256, "imagenet_vit_b16": 128, "imagenet_vit_l16": 64,
          "imagenet_vit_l16_script": 64, "semi_1pct": 128, "semi_10pct": 128}
# fmt: on


def from_recipe(name: str, **changes: Any) -> FinetuneStageConfig:
    settings = config.load_recipe(f"finetune/{name}")
    del settings["stage"]
    return validate_model(FinetuneStageConfig, settings | changes, "x.yaml")


@pytest.mark.parametrize("name", EXPECTED)
def test_recipes_are_the_released_ones(name: str) -> None:
    made = cfg = from_recipe(name)
    low = 1e-6
    found = (made.epochs, made.batch_size, pytest.approx(made.peak_lr, rel=1e-12), made.rate.min_lr)
    rest = (
        made.rate.warmup_epochs,
        made.layer_decay,
        cfg.drop_path,
        made.weight_decay,
        made.images.erase_prob,
    )
    assert EXPECTED[name] == (*found, *rest)
    imagenet, semi = name.startswith("imagenet"), name.startswith("semi")
    assert (made.repeats, made.head.kind) == (
        1 if imagenet or semi else 3,
        "mlp" if semi else "linear",
    )
    assert (made.head.scale, made.head.hidden) == (0.001 if imagenet else 1.0, 2048)
    assert made.decay_tokens is not imagenet
    assert made.images.eval_interpolation == ("bilinear" if imagenet else "bicubic")
    assert (made.images.size, made.images.resize, made.images.scale) == (224, 256, (0.08, 1.0))
    assert made.mix == engine.MixOptions(group=GROUPS.get(name, 192))
    assert (made.rate.unit, made.precision) == ("step" if imagenet else "epoch", "bf16")
    schedule = FinetuneSchedule(made, 100)
    assert schedule.lr(0) == (0.0 if imagenet else low) and (imagenet or schedule.lr(100) == low)
    assert (cfg.labelled.percent if cfg.labelled else None) == (
        {"semi_1pct": 1.0, "semi_10pct": 10.0}.get(name)
    )


def test_steps_per_epoch_of_the_released_runs() -> None:
    """L by its log; the others by the released rule: parts of the labels,
    and CIFAR and Flowers with repeats.
    """
    cases = [
        (1_281_167, 1024, 1, 1251),
        (12_811, 512, 1, 25),
        (128_116, 1024, 1, 125),
        (50_000, 768, 3, 65),
    ]
    for num, batch, repeats, steps in [*cases, (2_040, 768, 3, 2)]:
        assert BatchSampler(num, seed=0, batch_size=batch, repeats=repeats).steps_per_epoch == steps


@pytest.mark.parametrize(
    "change",
    [
        {"rate": {}},
        {"rate": RATE, "weights": "random"},
        {"rate": RATE, "images": {"randaugment": "rand-x9"}},
        {"rate": RATE, "images": {"randaugment": "augmix"}},
        {"rate": RATE, "mix": {"group": 3}},
        {"rate": RATE, "mix": {"alpha": 1}},
        {"rate": RATE, "labelled": {"percent": 0}},
        {"rate": RATE, "head": {"init": "pretrained"}},
        {"rate": RATE, "layer_decay": 0},
        {"rate": RATE, "precision": "fp16"},
    ],
    ids=str,
)
def test_mistakes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        validate_model(FinetuneStageConfig, {"epochs": 1, "batch_size": 8} | change, "x.yaml")


@pytest.mark.parametrize(
    ("change", "ranks", "words"),
    [
        ({"batch_size": 100}, 8, "leaves 12.50 images each"),
        (
            {"batch_size": 24, "mix": {"group": 16}},
            4,
            "batch_size 24 does not divide into groups of 16 (mix.group)",
        ),
        (
            {"batch_size": 24},
            8,
            "batch_size 24 over 8 ranks leaves 3 images each, which are mixed in pairs",
        ),
        (
            {"batch_size": 24, "micro_batch_size": 4},
            4,
            "micro_batch_size 4 cuts into 1.50 passes",
        ),
        ({"batch_size": 24, "mix": {"prob": 0}}, 8, None),
        ({"batch_size": 1024, "mix": {"group": 256}}, 8, None),
    ],
)
def test_batches_that_do_not_work_out(
    change: dict[str, Any], ranks: int, words: str | None
) -> None:
    cfg = validate_model(FinetuneStageConfig, {"epochs": 1, "rate": RATE} | change, "x.yaml")
    wrong = pytest.raises(ValueError, match=re.escape(words)) if words else nullcontext()
    with wrong:
        cfg.check_resources(Resources(ranks_per_node=ranks))


SMALL: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 16,
    "rate": {"base_lr": 1e-2, "warmup_epochs": 0},
    "images": {"size": 16, "resize": 16},
    "workers": 0,
}


def entry(paths: dict[str, Path], info: dict[str, Any]) -> Any:
    """A finished pretraining with these outputs."""
    stored = {name: SimpleNamespace(sha256=hash_path(path)) for name, path in paths.items()}
    return SimpleNamespace(name="pretrain", info=info, outputs=stored, output=paths.__getitem__)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("inputs")
    materialize_digits(root / "digits")
    for split in ("train", "val"):
        convert_to_beton(FolderSource(root / "digits" / "val"), root / f"{split}.beton")
    shape = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 16}
    for name in ("teacher", "student", "initial"):
        state = build_vit(ViTConfig(**shape)).state_dict()
        write_backbone_file(root / f"{name}.safetensors", state, {"arch": shape, "weights": name})
    data = {"dataset": "sklearn_digits", "num_classes": 10}
    weights = {"method": "mugs", "arch": "vit_mini", "epochs": 24, "seed": 0}
    return {
        "data": SimpleNamespace(
            info=data, outputs=("train", "val"), output=lambda n: root / f"{n}.beton"
        ),
        "weights": entry(
            {n: root / f"{n}.safetensors" for n in ("teacher", "student", "initial")}, weights
        ),
    }


def run(tmp_path: Path, inputs: dict[str, Any], **change: Any) -> Any:
    torch.set_num_threads(1)
    ctx: Any = SimpleNamespace(
        stage="finetune", run_id="r", run_dir=tmp_path, inputs=inputs, control=None
    )
    return stage.run(ctx, validate_model(FinetuneStageConfig, SMALL | change, "x.yaml"))


def test_rows_and_output(tmp_path: Path, inputs: dict[str, Any], meetings: list[set[Path]]) -> None:
    out = run(tmp_path, inputs)
    found = [
        (r.method, r.arch, r.epochs, r.dataset, r.stage, r.setting, r.metric) for r in out.rows
    ]
    head = ("mugs", "vit_mini", 24, "sklearn_digits", "finetune")
    expected = [
        (*head, f"{which} epoch", metric)
        for which in ("best", "last")
        for metric in ("top1", "top5")
    ]
    assert found == expected and all(0 <= r.value <= 100 and r.unit == "%" for r in out.rows)
    assert out.rows[0].value >= out.rows[2].value and out.rows[0].value <= out.rows[1].value
    state, meta = read_backbone_file(out.outputs["classifier"])
    assert out.outputs["classifier"] in meetings[-1]
    assert state["head.weight"].shape == (10, 16) and meta["weights"] == "finetuned"
    assert out.info["method"] == "mugs" and out.info["num_classes"] == 10


def test_part_of_the_labels_and_scratch(tmp_path: Path, inputs: dict[str, Any]) -> None:
    labelled = {"percent": 50, "by": "class_balanced"}
    out = run(tmp_path, inputs, labelled=labelled, weights="scratch", seed=5)
    assert {(r.method, r.seed) for r in out.rows} == {("mugs (scratch)", 5)}
    assert {r.setting for r in out.rows} == {
        "50% of labels, best epoch",
        "50% of labels, last epoch",
    }


def test_where_it_starts(inputs: dict[str, Any], tmp_path: Path) -> None:
    ctx: Any = SimpleNamespace(inputs=inputs)

    def built(weights: str, seed: int = 0) -> dict[str, torch.Tensor]:
        cfg = validate_model(
            FinetuneStageConfig, SMALL | {"weights": weights, "seed": seed}, "x.yaml"
        )
        return dict(stage.build_model(ctx, cfg, 10).backbone.state_dict())

    for name in ("teacher", "student", "initial"):
        state, _ = read_backbone_file(inputs["weights"].output(name))
        assert all(torch.equal(value, state[key]) for key, value in built(name).items())
    one, two, again = built("scratch"), built("scratch", seed=1), built("scratch")
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["pos_embed"], two["pos_embed"])
    assert not torch.equal(one["pos_embed"], built("teacher")["pos_embed"])


def test_size_that_does_not_fit_the_patches(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"images\.size 20: expected a multiple of the patch size 8"
    ):
        run(tmp_path, inputs, images={"size": 20, "resize": 20})


def test_a_pretrained_first_layer(inputs: dict[str, Any], tmp_path: Path) -> None:
    path, layer = tmp_path / "projection.safetensors", torch.nn.Linear(16, 32)
    write_backbone_file(path, layer.state_dict(), {"weights": "projection"})
    head = {"kind": "mlp", "hidden": 32, "init": "pretrained"}
    weights = inputs["weights"]
    ctx: Any = SimpleNamespace(inputs=dict(inputs))

    def first(**change: Any) -> torch.nn.Module:
        cfg = validate_model(FinetuneStageConfig, SMALL | {"head": head | change}, "x.yaml")
        return next(stage.build_model(ctx, cfg, 10).head.children())

    with pytest.raises(ValueError, match="run 'pretrain' has no output 'projection'; use random"):
        first()
    paths = {"projection": path} | {name: weights.output(name) for name in weights.outputs}
    ctx.inputs["weights"] = entry(paths, weights.info)
    assert torch.equal(first().weight, layer.weight) and torch.equal(first().bias, layer.bias)
    assert not torch.equal(first(init="random").weight, layer.weight)
    with pytest.raises(
        ValueError, match=r"the projection is \(32, 16\), head.hidden asks for \(64, 16\)"
    ):
        first(hidden=64)


def test_changed_weights_are_refused(inputs: dict[str, Any], tmp_path: Path) -> None:
    weights, path = inputs["weights"], tmp_path / "teacher.safetensors"
    state, meta = read_backbone_file(weights.output("teacher"))
    changed = entry({"teacher": weights.output("teacher")}, weights.info)
    write_backbone_file(path, {name: value + 1 for name, value in state.items()}, meta)
    changed.output = {"teacher": path}.__getitem__
    with pytest.raises(DamagedError, match=r"teacher\.safetensors: output 'teacher' differs"):
        run(tmp_path, inputs | {"weights": changed})


def test_labels_are_needed(inputs: dict[str, Any], tmp_path: Path) -> None:
    data = SimpleNamespace(info={"dataset": "web", "num_classes": 0}, outputs=("train", "val"))
    with pytest.raises(ValueError, match="'web' has no labels, which stage 'finetune' needs"):
        run(tmp_path, inputs | {"data": data})
