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
    """Everything of the method that shapes numbers. Defaults: the released ViT-S runs,
    except `memory_start`.
    """

    arch: Internal[str | ViTConfig] = "vit_s16"
    # Stochastic depth of the student's last block; it grows linearly from 0. The teacher has none.
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # Width of the hidden layers of all projectors.
    head_hidden: int = 2048
    # Width of the hidden layer of the two predictors.
    predictor_hidden: int = 4096
    # Width of the features that InfoNCE compares.
    head_out: int = 256
    # Width of the features that are compared with the prototypes (M23).
    group_bottleneck: int = 256
    # Prototypes of the group loss.
    num_prototypes: int = 65536
    # Whether the lengths of the prototypes are trained or stay 1.
    train_prototype_magnitude: bool = True
    # Negatives in the queue of each InfoNCE loss.
    queue_size: int = 65536
    # Past features among which neighbors are looked up.
    memory_size: int = 65536
    # Neighbors that the relation blocks see beside a token.
    num_neighbours: int = 8
    # Temperature of the instance InfoNCE loss.
    instance_temperature: float = 0.2
    # Temperature of the local-group InfoNCE loss.
    local_group_temperature: float = 0.2
    # Temperature of the student's softmax over prototypes.
    group_student_temperature: float = 0.1
    # First and last value of a linear warm-up over `group_teacher_warmup_epochs`.
    group_teacher_temperature: tuple[float, float] = (0.04, 0.04)
    # Epochs over which the teacher's temperature changes.
    group_teacher_warmup_epochs: int = 0
    # Momentum of the center that is taken from the teacher's logits.
    center_momentum: float = 0.9
    # Weights of instance, local-group and group loss. 0 also removes the head, queue and memories
    # (M5, M6).
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    # Transformer blocks over a token and its neighbors: the paper has 2 (M7).
    relation_depth: Literal[1, 2] = 1
    # `mugs.models.memory.NeighbourMemory` explains both (M1, M33).
    memory_pointer: PointerRule = "released"
    # Whether both tables of a memory start alike (M33).
    memory_start: Literal["common", "released"] = "common"
    # "released": one per network, the student's for weak images only. "shared": one for both (the
    # paper, M9).
    memories: Literal["released", "shared"] = "released"
    # `mugs.methods.network.MugsNetwork` explains it (M3).
    local_group_token: LocalGroupToken = "released"
    # Weights of the pairs of crops: large and small pairs half each, or all alike (M8).
    pair_average: PairAverage = "released"
    # `mugs.models.heads.InfoNCEHead` explains both (M10).
    predictor_init: PredictorInit = "released"
    # Batch normalization in the hidden layers of the projectors, over all ranks.
    head_norm: HeadNorm = "none"
