"""Settings of Mugs."""

from dataclasses import dataclass
from typing import Literal

from mugs.losses.pairs import PairAverage
from mugs.models.heads import HeadNorm, PredictorInit
from mugs.models.memory import PointerRule
from mugs.models.vit import ViTConfig

LocalGroupToken = Literal["released", "paper"]


@dataclass(frozen=True, kw_only=True)
class MugsConfig:
    """Everything of the method that shapes numbers. Defaults: the released ViT-S runs, but for `memory_start`.

    loss_weights: of instance, local-group and group loss; 0 leaves out head, queue and memories too (rows M5, M6).
    relation_depth: transformer blocks over a token and its neighbours, 2 in the paper (M7).
    memory_pointer, memory_start: `mugs.models.memory.NeighborMemory` (M1, M33).
    memories: "released" has one per network, the student's for weak images only; "shared" one for both (paper, M9).
    local_group_token: `mugs.methods.network.MugsNetwork` (M3). pair_average: `mugs.losses.pairs` (M8).
    predictor_init, head_norm: `mugs.models.heads.InfoNCEHead` (M10).
    """

    arch: str | ViTConfig = "vit_s16"
    drop_path: float = 0.1
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
    group_teacher_temperature: tuple[float, float] = (0.04, 0.04)
    group_teacher_warmup_epochs: int = 0
    center_momentum: float = 0.9
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    relation_depth: int = 1
    memory_pointer: PointerRule = "released"
    memory_start: Literal["common", "released"] = "common"
    memories: Literal["released", "shared"] = "released"
    local_group_token: LocalGroupToken = "released"
    pair_average: PairAverage = "released"
    predictor_init: PredictorInit = "released"
    head_norm: HeadNorm = "none"
