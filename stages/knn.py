"""Weighted k-NN classification on frozen features (recipe of the paper's appendix; temperatures as released)."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import PositiveInt

from pipeline.settings import FormerName, Runtime
from pipeline.spec import Resources, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.frozen import FROZEN, FrozenEvaluation, frozen_features, num_classes, result_row


@dataclass(frozen=True, kw_only=True)
class KnnConfig(FrozenEvaluation):
    """`temperatures`: the released ViT-S script uses 0.05, DINO, iBOT and the code's default 0.07."""

    feature: Literal["cls", "patch_mean"] = "cls"
    ks: tuple[int, ...] = (10, 15, 20, 30, 40, 50, 100, 200)
    temperatures: tuple[float, ...] = (0.05, 0.07)
    eval_batch_size: Annotated[Runtime[PositiveInt], FormerName("images_per_pass")] = 256
    threads: Runtime[PositiveInt] = 2
    memory_mb: Runtime[PositiveInt] = 2048


def run(ctx: StageContext, cfg: KnnConfig) -> StageOutput:
    """Features of both splits, then every k and temperature in one pass; one row per pair."""
    from mugs.evaluation.knn import evaluate_knn

    classes = num_classes(ctx)
    found = frozen_features(
        ctx, cfg, cfg.feature, eval_batch_size=cfg.eval_batch_size, threads=cfg.threads
    )
    accuracy = evaluate_knn(
        *found["train"],
        *found["val"],
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


SPEC = StageSpec(
    name="knn",
    config=KnnConfig,
    entrypoint="stages.knn:run",
    needs=FROZEN,
    resources=Resources(ranks_per_node=1, hours=2.0),
)
