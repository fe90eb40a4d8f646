"""Linear probing on frozen features: the released settings, and the sweep of 360 classifiers."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from mugs.evaluation.config import Feature, LinearProbe, Setting
from pipeline.settings import Runtime, Settings
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.batch_checks import check_even_batch
from stages.shared.frozen import (
    FROZEN,
    FrozenEvaluation,
    build_result_row,
    load_features,
    load_vit,
    read_num_classes,
)

if TYPE_CHECKING:
    import torch

    from mugs.evaluation.linear import BatchFactory


@dataclass(frozen=True, kw_only=True)
class Sweep(Settings):
    """Classifiers trained together, one per combination; by default the released ViT-L probe's."""

    # Learning rates for a batch of 256.
    base_lrs: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = tuple(
        round(n * 10.0**e, 4) for e in (-4, -3, -2, -1) for n in range(1, 10)
    )
    # Weight decays, each with every rate.
    weight_decays: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (
        0.0,
        1e-6,
        1e-5,
        1e-4,
        1e-3,
    )
    # Optimizers, each with every rate and decay.
    optimizers: Annotated[tuple[Literal["sgd", "lars"], ...], Field(min_length=1)] = ("sgd", "lars")


@dataclass(frozen=True, kw_only=True)
class LinearConfig(FrozenEvaluation, LinearProbe):
    """A linear probe; the recipes linear/s100 to linear/l250 are the released ones.

    `augmentation`: the released code trains the probe on strong views, DINO and iBOT on crop and
    flip; "none" trains on features of center crops, computed once, and is what stored features are
    for. `sweep` replaces `base_lr`.
    """

    usual_feature: ClassVar[Feature] = "last4_cls"

    # Learning rate for a batch of 256; 0.015 without it and without a sweep.
    base_lr: PositiveFloat | None = None
    # Train one classifier for each combination, instead of one with `base_lr` (E4).
    sweep: Sweep | None = None
    # `strong` as released, `crop_flip` as DINO and iBOT, `none` for stored features (E16).
    augmentation: Literal["strong", "crop_flip", "none"] = "strong"
    threads: Runtime[PositiveInt] = 2
    checkpoint_steps: Runtime[PositiveInt] = 1000

    def __post_init__(self) -> None:
        """Refuse two ways of choosing the classifiers, and set the default rate."""
        super().__post_init__()
        if self.base_lr is not None and self.sweep is not None:
            raise ValueError("give either base_lr or sweep, not both")
        # Not the field's default: with that, a sweep would count as given together with it.
        if self.base_lr is None and self.sweep is None:
            object.__setattr__(self, "base_lr", 0.015)

    def check_resources(self, resources: Resources) -> None:
        """Require that the batch divides over the ranks."""
        check_even_batch(self.batch_size, resources)

    def check_inputs(self, inputs: Mapping[str, StageConfig]) -> None:
        """Refuse augmentation of stored features, and what every frozen evaluation refuses."""
        if "features" in inputs and self.augmentation != "none":
            raise ValueError(
                f"augmentation {self.augmentation} needs data and weights; "
                "stored features go with none"
            )
        super().check_inputs(inputs)


def run(ctx: StageContext, cfg: LinearConfig) -> StageOutput:
    """Train the probe; rows `best epoch` and `last epoch`, both on the validation split.

    The best epoch is what the release reports.
    """
    from mugs import distributed
    from mugs.engine.loop import train
    from mugs.evaluation.linear import LinearProbeTraining

    classes = read_num_classes(ctx)
    device = distributed.init_process_group()
    probe = build_probe(cfg)
    batches, steps, validation = build_probe_data(ctx, cfg, device)
    task = LinearProbeTraining(probe, batches, steps, validation, classes, ctx.run_dir)
    train(task, ctx.run_dir / "checkpoints", every=cfg.checkpoint_steps, control=ctx.control)
    history = ctx.run_dir / "history.csv"
    if distributed.is_main():
        task.write_history(history)
    best = task.best(range(cfg.epochs))
    last = task.best([cfg.epochs - 1])
    # Both are the best of all classifiers of a sweep, which the row has to say.
    count = len(probe.settings)
    feature = cfg.chosen_feature if count == 1 else f"{cfg.chosen_feature}, best of {count}"
    rows = [
        build_result_row(
            ctx,
            cfg.weights,
            setting=f"{feature}, {cfg.augmentation}, {which} epoch",
            value=chosen.top1,
        )
        for which, chosen in (("best", best), ("last", last))
    ]
    return StageOutput(
        outputs={"history": history},
        rows=rows,
        info={
            "best_epoch": best.epoch,
            "best_setting": str(best.setting),
            "last_setting": str(last.setting),
        },
    )


def build_probe(cfg: LinearConfig) -> LinearProbe:
    """Return the configuration with the classifiers that `base_lr` or `sweep` stands for."""
    sweep = cfg.sweep or Sweep(
        base_lrs=(cfg.base_lr or 0.0,), weight_decays=(0.0,), optimizers=("sgd",)
    )
    # Rates vary fastest. Classifiers are initialized and checkpointed in this order.
    every = itertools.product(sweep.optimizers, sweep.weight_decays, sweep.base_lrs)
    settings = tuple(Setting(rate, decay, optimizer) for optimizer, decay, rate in every)
    return replace(cfg, settings=settings)


def build_probe_data(
    ctx: StageContext, cfg: LinearConfig, device: "torch.device"
) -> "tuple[BatchFactory, int, tuple[torch.Tensor, torch.Tensor]]":
    """Return training batches, their number per epoch, and validation features and labels."""
    from mugs.data.sources.open import open_source
    from mugs.evaluation.features import build_feature_function
    from mugs.evaluation.linear import build_feature_batches, build_image_batches, build_order

    if cfg.augmentation == "none":
        found = load_features(ctx, cfg, cfg.chosen_feature, threads=cfg.threads)
        order = build_order(len(found["train"][0]), seed=cfg.seed, batch_size=cfg.batch_size)
        return build_feature_batches(*found["train"], order), order.steps_per_epoch, found["val"]
    # Validation images are not augmented, so their features are computed once for all epochs.
    validation = load_features(ctx, cfg, cfg.chosen_feature, ["val"], threads=cfg.threads)["val"]
    source = open_source(ctx.inputs["data"].output("train"))
    order = build_order(len(source), seed=cfg.seed, batch_size=cfg.batch_size)
    model = build_feature_function(load_vit(ctx, cfg.weights).to(device), cfg.chosen_feature)
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
