"""Supervised fine-tuning: on all labels, on a part of them, on other data sets (best and last epoch are recorded)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from pipeline.manifest import check_intact
from pipeline.spec import Resources, Runtime, StageConfig
from pipeline.stage import StageContext, StageOutput
from results.schema import ResultRow
from stages.convert import ConvertConfig
from stages.shared.batch_checks import uneven, uneven_pairs, uneven_passes
from stages.shared.finetune_presets import PRESETS, Preset
from stages.shared.frozen import Pretrained, load_vit, num_classes, result_row
from stages.shared.labelled import LabelledPart
from stages.shared.presets import filled, same_named

if TYPE_CHECKING:
    from torch import nn

    from mugs.data.sources.base import Source
    from mugs.finetune.classifier import ImageClassifier
    from mugs.finetune.config import FinetuneConfig as Settings
    from mugs.finetune.validation import EpochAccuracy

RANDAUGMENT = r"^(rand(-(m\d+|n\d+|p[\d.]+|mstd[\d.]+|mmax\d+|inc[01]))*)?$"


class Rate(StageConfig):
    """Fields of `mugs.finetune.config.RateOptions`, whose docstring explains them."""

    base_lr: float = Field(gt=0)
    lr_batch: int | None = Field(None, ge=1)
    unit: Literal["step", "epoch"] = "step"
    warmup_epochs: int = Field(5, ge=0)
    warmup_lr: float = Field(0.0, ge=0)
    min_lr: float = Field(1e-6, ge=0)
    epoch_lag: bool = True


class Images(StageConfig):
    """Fields of `mugs.finetune.config.ImageOptions`."""

    size: int = Field(224, ge=1)
    scale: tuple[float, float] = (0.08, 1.0)
    flip_prob: float = Field(0.5, ge=0, le=1)
    randaugment: str = Field("rand-m9-mstd0.5-inc1", pattern=RANDAUGMENT)
    erase_prob: float = Field(0.25, ge=0, le=1)
    resize: int = Field(256, ge=1)
    eval_interpolation: Literal["bicubic", "bilinear"] = "bicubic"


class Mix(StageConfig):
    """Fields of `mugs.finetune.config.MixOptions`."""

    mixup: float = Field(0.8, ge=0)
    cutmix: float = Field(1.0, ge=0)
    prob: float = Field(1.0, ge=0, le=1)
    switch_prob: float = Field(0.5, ge=0, le=1)
    smoothing: float = Field(0.1, ge=0, lt=1)
    group: int | None = Field(None, ge=2, multiple_of=2)

    @property
    def on(self) -> bool:
        """Whether images are mixed at all."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


class Head(StageConfig):
    """Fields of `mugs.finetune.config.HeadOptions`, and where the first of two layers starts.

    `init`: "random" as released, whose loader misses the names (row E8); "pretrained" takes the first layer of the
    pretraining's group head, as iBOT's protocol does with its only head.
    """

    kind: Literal["linear", "mlp"] = "linear"
    hidden: int = Field(2048, ge=1)
    scale: float = Field(1.0, gt=0)
    init: Literal["random", "pretrained"] = "random"

    @model_validator(mode="after")
    def _two_layers_for_a_pretrained_one(self) -> "Head":
        if self.init == "pretrained" and self.kind == "linear":
            raise ValueError("head.kind mlp with head.init pretrained")
        return self


class FinetuneConfig(StageConfig):
    """A fine-tuning run.

    `preset` names a row of the released recipes (`stages/shared/finetune_presets.py`): it gives every field that is not given
    its value there. The run id follows the fields that come out, not the preset. `weights`: "initial" is where the
    pretraining started; "scratch" draws a network of its shape from `seed`. `labelled` leaves only a part of the
    training images, for semi-supervised learning. The exponential moving average that the release keeps of these
    weights is left out: it never evaluates it.
    """

    preset: Preset | None = Runtime(None)
    weights: Literal["teacher", "student", "initial", "scratch"] = "teacher"
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    rate: Rate
    images: Images = Images()
    mix: Mix = Mix()
    head: Head = Head()
    labelled: LabelledPart | None = None
    weight_decay: float = Field(0.05, ge=0)
    layer_decay: float = Field(1.0, gt=0, le=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    repeats: int = Field(1, ge=1)
    validate_epochs: int = Field(1, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    max_images_per_step: int | None = Runtime(None, ge=1)
    workers: int = Runtime(2, ge=0)
    checkpoint_steps: int = Runtime(500, ge=1)
    log_steps: int = Runtime(10, ge=1)
    activation_checkpointing: bool = Runtime(False)
    compile: bool = Runtime(False)

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") not in PRESETS:
            return values
        return filled(values, PRESETS[values["preset"]])

    def misfit(self, resources: Resources) -> str | None:
        """A batch that does not divide over ranks, groups and pairs, or a rank's share over its passes."""
        pairs = uneven_pairs(self.batch_size, resources, self.mix.group) if self.mix.on else None
        passes = uneven_passes(self.batch_size, resources, self.max_images_per_step, whole=False)
        return uneven(self.batch_size, resources) or pairs or passes

    def wrong_inputs(self, inputs: Mapping[str, StageConfig]) -> str | None:
        """Weights that there are not; any say what shape to start from scratch with."""
        return (
            None
            if self.weights == "scratch"
            else Pretrained(weights=self.weights).wrong_inputs(inputs)
        )


def preflight(cfg: FinetuneConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """What the list of labelled images names, if there is one. Raises SourceError."""
    data = inputs["data"]
    assert isinstance(data, ConvertConfig)
    return cfg.labelled.look(data) if cfg.labelled else "all labels", 0.0


def run(ctx: StageContext, cfg: FinetuneConfig) -> StageOutput:
    """Train and validate; rows `best epoch` (the released selection, on the validation split) and `last epoch`.

    Output `classifier`: backbone and head after the last epoch.
    """
    from dataclasses import asdict

    from mugs import distributed
    from mugs.data.sources.open import open_source
    from mugs.finetune.train import Finetuning
    from mugs.weights.backbone_file import write_backbone_file

    classes = num_classes(ctx)
    device = distributed.init_process_group()
    data, source_info = ctx.inputs["data"], ctx.inputs["weights"].info
    train: Source = open_source(data.output("train"))
    if cfg.labelled is not None:
        train = cfg.labelled.choose(train, data.info["dataset"])
    model = build_model(ctx, cfg, classes)
    sources = (train, open_source(data.output("val")))
    task = Finetuning(model, sources, settings(cfg), ctx.run_dir, device, classes)
    task.train(ctx.control)
    path = ctx.run_dir / "weights" / "classifier.safetensors"
    arch = asdict(model.backbone.config)
    if distributed.is_main():
        write_backbone_file(
            path,
            dict(model.state_dict()),
            {"arch": arch, "weights": "finetuned", "num_classes": classes},
        )
    distributed.barrier()
    facts = {name: source_info[name] for name in ("method", "arch", "epochs", "seed")}
    info = {**facts, "shape": arch, "dataset": data.info["dataset"], "num_classes": classes}
    return StageOutput(outputs={"classifier": path}, rows=rows(ctx, cfg, task.history), info=info)


def rows(ctx: StageContext, cfg: FinetuneConfig, history: "list[EpochAccuracy]") -> list[ResultRow]:
    """Top-1 and top-5 of the best and of the last epoch."""
    part = f"{cfg.labelled.words()}, " if cfg.labelled is not None else ""
    best, last = max(history, key=lambda epoch: epoch.top1), history[-1]
    weights = "teacher" if cfg.weights == "scratch" else cfg.weights
    made = [
        result_row(
            ctx, weights, setting=f"{part}{name} epoch", metric=metric, value=getattr(epoch, metric)
        )
        for name, epoch in (("best", best), ("last", last))
        for metric in ("top1", "top5")
    ]
    if cfg.weights == "scratch":
        return [replace(row, method=f"{row.method} (scratch)", seed=cfg.seed) for row in made]
    return made


def build_model(ctx: StageContext, cfg: FinetuneConfig, classes: int) -> "ImageClassifier":
    """The backbone with the weights asked for, and a new head. Raises ValueError where image and patch do not fit."""
    import torch

    from mugs.finetune.classifier import ImageClassifier, build_head
    from mugs.finetune.config import HeadOptions
    from mugs.models.vit import build_vit

    label = "teacher" if cfg.weights == "scratch" else cfg.weights
    vit = load_vit(ctx, label, drop_path=cfg.drop_path).requires_grad_(True)
    shape = vit.config
    if cfg.images.size % shape.patch_size:
        raise ValueError(
            f"images.size {cfg.images.size}: expected a multiple of the patch size {shape.patch_size}"
        )
    if cfg.weights == "scratch":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            vit = build_vit(shape, drop_path=cfg.drop_path)
    vit.activation_checkpointing = cfg.activation_checkpointing
    if cfg.compile:
        for block in vit.blocks:
            block.compile()
    head = build_head(
        HeadOptions(**cfg.head.model_dump(exclude={"init"})), shape.embed_dim, classes, cfg.seed
    )
    if cfg.head.init == "pretrained":
        load_projection(ctx, head)
    return ImageClassifier(vit, head)


def load_projection(ctx: StageContext, head: "nn.Module") -> None:
    """The first layer of the pretraining's group head into that of a two-layer head. Raises ValueError."""
    from mugs.finetune.classifier import load_first_layer
    from mugs.weights.backbone_file import read_backbone_file

    entry = ctx.inputs["weights"]
    if "projection" not in entry.outputs:
        raise ValueError(
            f"head.init pretrained: run {entry.name!r} has no output 'projection'; use random"
        )
    check_intact(entry, "projection")
    load_first_layer(head, read_backbone_file(entry.output("projection"))[0])


def settings(cfg: FinetuneConfig) -> "Settings":
    """The engine's configuration."""
    from mugs.finetune import config as engine

    return same_named(
        engine.FinetuneConfig,
        cfg,
        rate=engine.RateOptions(**cfg.rate.model_dump()),
        images=engine.ImageOptions(**cfg.images.model_dump()),
        mix=engine.MixOptions(**cfg.mix.model_dump()),
        head=engine.HeadOptions(**cfg.head.model_dump(exclude={"init"})),
    )
