"""Settings of Mugs."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from mugs.losses.config import PairAverage
from mugs.models.config import HeadNorm, PointerRule, PredictorInit, ViTConfig
from pipeline.settings import Internal, Settings

LocalGroupToken = Literal["released", "paper"]


@dataclass(frozen=True, kw_only=True)
class MugsConfig(Settings):
    """Everything of the method that shapes numbers. Defaults: the released ViT-S runs, except `memory_start`."""

    arch: Internal[str | ViTConfig] = "vit_s16"
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    head_hidden: int = 2048
    predictor_hidden: int = 4096
    head_out: int = 256
    group_bottleneck: int = 256
    num_prototypes: int = 65536
    train_prototype_magnitude: bool = True
    queue_size: int = 65536
    memory_size: int = 65536
    num_neighbours: int = 8
    instance_temperature: float = 0.2
    local_group_temperature: float = 0.2
    group_student_temperature: float = 0.1
    # First and last value of a linear warm-up over `group_teacher_warmup_epochs`.
    group_teacher_temperature: tuple[float, float] = (0.04, 0.04)
    group_teacher_warmup_epochs: int = 0
    center_momentum: float = 0.9
    # Weights of instance, local-group and group loss. 0 also removes the head, queue and memories (M5, M6).
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    # Transformer blocks over a token and its neighbours: the paper has 2 (M7).
    relation_depth: Literal[1, 2] = 1
    # `mugs.models.memory.NeighbourMemory` explains both (M1, M33).
    memory_pointer: PointerRule = "released"
    memory_start: Literal["common", "released"] = "common"
    # "released": one per network, the student's for weak images only. "shared": one for both (the paper, M9).
    memories: Literal["released", "shared"] = "released"
    # `mugs.methods.network.MugsNetwork` explains it (M3).
    local_group_token: LocalGroupToken = "released"
    pair_average: PairAverage = "released"
    # `mugs.models.heads.InfoNCEHead` explains both (M10).
    predictor_init: PredictorInit = "released"
    head_norm: HeadNorm = "none"
