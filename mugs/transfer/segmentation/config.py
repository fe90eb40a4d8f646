"""Settings of a segmentation run."""

from dataclasses import dataclass, field
from typing import Literal

from mugs.transfer.segmentation.model import SegmenterConfig
from mugs.transfer.segmentation.recipe import SceneRecipe


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """ViT-S/16 with UPerNet on ADE20K by default. `batch_size` is global; the last three cannot change a number.

    layer_decay is 1 for the linear variant, whose ViT is not trained.
    """

    model: SegmenterConfig
    scenes: SceneRecipe = field(default_factory=SceneRecipe)
    steps: int = 160_000
    batch_size: int = 16
    lr: float = 3e-5
    weight_decay: float = 0.05
    layer_decay: float = 0.9
    warmup_steps: int = 1500
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = 0
    workers: int = 8
    checkpoint_steps: int = 1000
    log_steps: int = 50
