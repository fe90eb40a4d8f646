"""The stages there are: thin glue from a configuration and inputs to `mugs` and back to files and rows."""

from __future__ import annotations

from pipeline.spec import Resources, StageSpec
from stages.convert import ConvertConfig
from stages.knn import KnnConfig
from stages.linear import LinearConfig
from stages.pretrain import PretrainConfig

STAGES: dict[str, StageSpec] = {
    "convert": StageSpec(
        name="convert",
        config=ConvertConfig,
        entrypoint="stages.convert:run",
        check="stages.convert:check",
        resources=Resources(gpu=False, cpus_per_rank=16, hours=4.0),
    ),
    "pretrain": StageSpec(
        name="pretrain",
        config=PretrainConfig,
        entrypoint="stages.pretrain:run",
        needs={"data": "convert"},
        resources=Resources(nodes=1, ranks_per_node=8, hours=36.0),
    ),
    "knn": StageSpec(
        name="knn",
        config=KnnConfig,
        entrypoint="stages.knn:run",
        needs={"data": "convert", "weights": "pretrain"},
        resources=Resources(ranks_per_node=1, hours=2.0),
    ),
    "linear": StageSpec(
        name="linear",
        config=LinearConfig,
        entrypoint="stages.linear:run",
        needs={"data": "convert", "weights": "pretrain"},
        resources=Resources(ranks_per_node=8, hours=24.0),
    ),
}
