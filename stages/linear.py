"""Linear probing on frozen features (the released ViT-S recipes; best and last epoch are both recorded)."""

from typing import Literal

from pydantic import Field

from pipeline.spec import Resources, Runtime, StageConfig, StageContext, StageOutput
from stages.evaluate import Weights, load_vit, num_classes, result_row
from stages.global_batch import uneven


class LinearConfig(StageConfig):
    """`augmentation`: the released code trains the probe on strong views, DINO and iBOT on crop and flip.

    "none" trains on the features of centre crops, which are computed once.
    """

    weights: Weights = "teacher"
    feature: Literal["last4_cls", "cls_patchmean"] = "last4_cls"
    base_lr: float = Field(0.015, gt=0)
    final_lr: float = Field(1e-5, ge=0)
    batch_size: int = Field(1024, ge=1)
    epochs: int = Field(100, ge=1)
    augmentation: Literal["strong", "crop_flip", "none"] = "strong"
    resize: int = Field(256, ge=1)
    crop: int = Field(224, ge=1)
    seed: int = 0
    threads: int = Runtime(2, ge=1)

    def misfit(self, resources: Resources) -> str | None:
        """A batch that does not divide over the ranks."""
        return uneven(self.batch_size, resources)


def run(ctx: StageContext, cfg: LinearConfig) -> StageOutput:
    """Train the probe; rows `best epoch` (the released selection, on the validation split) and `last epoch`."""
    from mugs.data.source import open_source
    from mugs.engine import distributed
    from mugs.evaluation.linear import LinearProbe, train_on_images

    classes = num_classes(ctx)
    device = distributed.init()
    data = ctx.inputs["data"]
    probe = LinearProbe(
        feature=cfg.feature,
        base_lr=cfg.base_lr,
        final_lr=cfg.final_lr,
        batch_size=cfg.batch_size,
        epochs=cfg.epochs,
        seed=cfg.seed,
    )
    history = train_on_images(
        probe,
        load_vit(ctx, cfg.weights).to(device),
        open_source(data.output("train")),
        open_source(data.output("val")),
        num_classes=classes,
        augmentation=cfg.augmentation,
        resize=cfg.resize,
        crop=cfg.crop,
        threads=cfg.threads,
        run_dir=ctx.run_dir,
        device=device,
    )
    best, last = max(history, key=lambda e: e.top1), history[-1]
    rows = [
        result_row(ctx, cfg.weights, setting=f"{cfg.feature}, best epoch", value=best.top1),
        result_row(ctx, cfg.weights, setting=f"{cfg.feature}, last epoch", value=last.top1),
    ]
    return StageOutput(rows=rows, info={"best_epoch": best.epoch})
