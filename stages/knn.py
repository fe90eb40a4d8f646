"""Weighted k-NN classification on frozen features (the paper's appendix; released temperatures)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pipeline.settings import FormerName, Runtime
from pipeline.spec import Resources, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.frozen import (
    FROZEN,
    FrozenEvaluation,
    build_result_row,
    check_neighbors,
    load_features,
    read_num_classes,
)


@dataclass(frozen=True, kw_only=True)
class KnnConfig(FrozenEvaluation):
    """Weighted k-NN.

    `temperatures`: the released ViT-S script uses 0.05; DINO, iBOT and the code's default 0.07.
    """

    feature: Literal["cls", "patch_mean"] | None = None
    ks: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (10, 15, 20, 30, 40, 50, 100, 200)
    temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.05, 0.07)
    eval_batch_size: Annotated[Runtime[PositiveInt], FormerName("images_per_pass")] = 256
    threads: Runtime[PositiveInt] = 2
    memory_mb: Runtime[PositiveInt] = 2048

    def check_image_counts(self, counts: Mapping[str, int]) -> None:
        """Require as many training images as neighbors."""
        check_neighbors(self.ks, counts)


def run(ctx: StageContext, cfg: KnnConfig) -> StageOutput:
    """Load the features of both splits and evaluate all settings; one row per k and temperature."""
    from mugs.evaluation.knn import evaluate_knn

    classes = read_num_classes(ctx)
    found = load_features(
        ctx, cfg, cfg.chosen_feature, eval_batch_size=cfg.eval_batch_size, threads=cfg.threads
    )
    # The neighbors of the largest k hold those of every other, so one search serves all settings.
    accuracy = evaluate_knn(
        *found["train"],
        *found["val"],
        num_classes=classes,
        ks=cfg.ks,
        temperatures=cfg.temperatures,
        memory_mb=cfg.memory_mb,
    )
    # Tables find a cell by this text, so its form is part of the file format.
    rows = [
        build_result_row(
            ctx, cfg.weights, setting=f"{cfg.chosen_feature}, k={k}, T={t:g}", value=value["top1"]
        )
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
