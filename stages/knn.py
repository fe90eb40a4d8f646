"""Weighted k-NN classification on frozen features (recipe of the paper's appendix; temperatures as released)."""

from typing import Literal

from pydantic import Field

from pipeline.spec import Runtime, StageConfig, StageContext, StageOutput
from stages.evaluate import Weights, load_vit, num_classes, result_row


class KnnConfig(StageConfig):
    """`temperatures`: the released ViT-S script uses 0.05, DINO, iBOT and the code's default 0.07."""

    weights: Weights = "teacher"
    feature: Literal["cls", "patch_mean"] = "cls"
    ks: tuple[int, ...] = (10, 15, 20, 30, 40, 50, 100, 200)
    temperatures: tuple[float, ...] = (0.05, 0.07)
    resize: int = Field(256, ge=1)
    crop: int = Field(224, ge=1)
    images_per_pass: int = Runtime(256, ge=1)
    threads: int = Runtime(2, ge=1)
    memory_mb: int = Runtime(2048, ge=1)


def run(ctx: StageContext, cfg: KnnConfig) -> StageOutput:
    """Features of both splits, then every k and temperature in one pass; one row per pair."""
    from mugs.data.evaluation import eval_batches
    from mugs.data.source import open_source
    from mugs.engine import distributed
    from mugs.evaluation.features import backbone_feature, extract
    from mugs.evaluation.knn import evaluate_knn

    classes = num_classes(ctx)
    device = distributed.init()
    model = backbone_feature(load_vit(ctx, cfg.weights).to(device), cfg.feature)
    data = ctx.inputs["data"]
    splits = {}
    for split in ("train", "val"):
        source = open_source(data.output(split))
        mine = range(distributed.rank(), len(source), distributed.world_size())
        batches = eval_batches(
            source,
            resize=cfg.resize,
            crop=cfg.crop,
            batch_size=cfg.images_per_pass,
            indices=list(mine),
            threads=cfg.threads,
        )
        splits[split] = extract(model, batches, device=device)
    (bank, bank_labels, _), (queries, labels, _) = splits["train"], splits["val"]
    accuracy = evaluate_knn(
        bank,
        bank_labels,
        queries,
        labels,
        num_classes=classes,
        ks=cfg.ks,
        temperatures=cfg.temperatures,
        memory_mb=cfg.memory_mb,
    )
    rows = [
        result_row(ctx, cfg.weights, setting=f"{cfg.feature}, k={k}, T={t:g}", value=value["top1"])
        for (k, t), value in accuracy.items()
    ]
    return StageOutput(rows=rows)
