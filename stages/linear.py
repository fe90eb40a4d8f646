"""Linear probing on frozen features: the five released settings, and the released sweep of 360 classifiers."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat, PositiveInt

from mugs.evaluation.config import LinearProbe, Setting
from pipeline.settings import Runtime, Settings
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.batch_checks import explain_uneven_batch
from stages.shared.frozen import (
    FROZEN,
    FrozenEvaluation,
    frozen_features,
    load_vit,
    num_classes,
    result_row,
)

if TYPE_CHECKING:
    import torch

    from mugs.evaluation.linear import BatchFactory


@dataclass(frozen=True, kw_only=True)
class Sweep(Settings):
    """Classifiers trained together, one for each combination; defaults are those of the released ViT-L probe."""

    # Learning rates for a batch of 256.
    base_lrs: tuple[float, ...] = tuple(
        round(n * 10.0**e, 4) for e in (-4, -3, -2, -1) for n in range(1, 10)
    )
    # Weight decays, each with every rate.
    weight_decays: tuple[float, ...] = (0.0, 1e-6, 1e-5, 1e-4, 1e-3)
    # Optimizers, each with every rate and decay.
    optimizers: tuple[Literal["sgd", "lars"], ...] = ("sgd", "lars")


@dataclass(frozen=True, kw_only=True)
class LinearConfig(FrozenEvaluation, LinearProbe):
    """A linear probe; the recipes linear/s100 to linear/l250 are the released ones.

    `augmentation`: the released code trains the probe on strong views, DINO and iBOT on crop and flip; "none" trains on
    features of centre crops, computed once, and is what stored features are for. `sweep` stands for `base_lr`.
    """

    feature: Literal["cls", "last4_cls", "cls_patchmean"] = "last4_cls"
    # Learning rate for a batch of 256; 0.015 without it and without a sweep.
    base_lr: PositiveFloat | None = None
    # Train one classifier for each combination, instead of one with `base_lr` (E4).
    sweep: Sweep | None = None
    # `strong` as released, `crop_flip` as DINO and iBOT, `none` for stored features (E16).
    augmentation: Literal["strong", "crop_flip", "none"] = "strong"
    threads: Runtime[PositiveInt] = 2
    checkpoint_steps: Runtime[PositiveInt] = 1000

    def __post_init__(self) -> None:
        """Refuse two ways of saying which classifiers are trained."""
        if self.base_lr is not None and self.sweep is not None:
            raise ValueError("give either base_lr or sweep, not both")
        if self.base_lr is None and self.sweep is None:
            object.__setattr__(self, "base_lr", 0.015)

    def misfit(self, resources: Resources) -> str | None:
        """A batch that does not divide over the ranks."""
        return explain_uneven_batch(self.batch_size, resources)

    def wrong_inputs(self, inputs: Mapping[str, StageConfig]) -> str | None:
        """As of every evaluation; stored features have no augmentation."""
        if "features" in inputs and self.augmentation != "none":
            return f"augmentation {self.augmentation} needs data and weights; stored features go with none"
        return super().wrong_inputs(inputs)


def run(ctx: StageContext, cfg: LinearConfig) -> StageOutput:
    """Train the probe; rows `best epoch` (the released selection, on the validation split) and `last epoch`."""
    from mugs import distributed
    from mugs.engine.loop import train
    from mugs.engine.precision import allow_tf32
    from mugs.evaluation.linear import LinearProbeTraining

    classes, device = num_classes(ctx), distributed.init_process_group()
    allow_tf32(device)
    probe = linear_probe(cfg)
    batches, steps, validation = probe_data(ctx, cfg, device)
    task = LinearProbeTraining(probe, batches, steps, validation, classes, ctx.run_dir)
    train(task, ctx.run_dir / "checkpoints", every=cfg.checkpoint_steps, control=ctx.control)
    history = ctx.run_dir / "history.csv"
    if distributed.is_main():
        task.write_history(history)
    best, last = task.best(range(cfg.epochs)), task.best([cfg.epochs - 1])
    feature = (
        cfg.feature if len(probe.settings) == 1 else f"{cfg.feature}, best of {len(probe.settings)}"
    )
    rows = [
        result_row(
            ctx,
            cfg.weights,
            setting=f"{feature}, {cfg.augmentation}, {which} epoch",
            value=chosen.top1,
        )
        for which, chosen in (("best", best), ("last", last))
    ]
    info = {
        "best_epoch": best.epoch,
        "best_setting": str(best.setting),
        "last_setting": str(last.setting),
    }
    return StageOutput(outputs={"history": history}, rows=rows, info=info)


def linear_probe(cfg: LinearConfig) -> LinearProbe:
    """Return the configuration with the classifiers that `base_lr` or `sweep` stands for."""
    sweep = cfg.sweep or Sweep(
        base_lrs=(cfg.base_lr or 0.0,), weight_decays=(0.0,), optimizers=("sgd",)
    )
    every = itertools.product(sweep.optimizers, sweep.weight_decays, sweep.base_lrs)
    settings = [Setting(rate, decay, optimizer) for optimizer, decay, rate in every]
    return replace(cfg, settings=tuple(settings))


def probe_data(
    ctx: StageContext, cfg: LinearConfig, device: "torch.device"
) -> "tuple[BatchFactory, int, tuple[torch.Tensor, torch.Tensor]]":
    """Training batches, their number in an epoch, and features and labels of the validation images."""
    from mugs.data.sources.open import open_source
    from mugs.evaluation.features import build_feature_function
    from mugs.evaluation.linear import build_feature_batches, build_image_batches, build_order

    if cfg.augmentation == "none":
        found = frozen_features(ctx, cfg, cfg.feature, threads=cfg.threads)
        order = build_order(len(found["train"][0]), seed=cfg.seed, batch_size=cfg.batch_size)
        return build_feature_batches(*found["train"], order), order.steps_per_epoch, found["val"]
    validation = frozen_features(ctx, cfg, cfg.feature, ["val"], threads=cfg.threads)["val"]
    source = open_source(ctx.inputs["data"].output("train"))
    order = build_order(len(source), seed=cfg.seed, batch_size=cfg.batch_size)
    model = build_feature_function(load_vit(ctx, cfg.weights).to(device), cfg.feature)
    batches = build_image_batches(
        model,
        source,
        order,
        seed=cfg.seed,
        augmentation=cfg.augmentation,
        crop=cfg.crop,
        threads=cfg.threads,
        device=device,
    )
    return batches, order.steps_per_epoch, validation


SPEC = StageSpec(
    name="linear",
    config=LinearConfig,
    entrypoint="stages.linear:run",
    needs=FROZEN,
    resources=Resources(ranks_per_node=8, hours=24.0),
)
