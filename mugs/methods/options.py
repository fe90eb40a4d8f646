"""The settings that all methods have, and what planning asks of a method.

Planning reads this file, so it does not import torch.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from mugs.data.views.config import ViewRecipe
from mugs.models.config import ViTConfig
from pipeline.settings import Internal, Settings


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Settings):
    """What all methods have; the settings of a method are a class derived from this one."""

    trains_class_token: ClassVar[bool] = True
    """Whether the class token after the last block is trained, which evaluations use by default."""

    # Set from the setting of the pretraining.
    arch: Internal[str | ViTConfig] = "vit_s16"
    # Stochastic depth of the student's last block; it grows linearly from 0. The teacher has none.
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @property
    def needs_whole_batch_per_rank(self) -> bool:
        """Whether a micro-batch would change the numbers, as with batch normalization."""
        return False

    def check_views(self, views: ViewRecipe) -> None:
        """Raise ValueError unless the method can use these views."""

    def list_late_settings(self, epochs: int) -> list[str]:
        """Return a line for each setting that waits longer than a run of so many epochs lasts."""
        return []

    def count_parameters(self, width: int, depth: int) -> int:
        """Return about how many parameters the student has; `width` and `depth` are the ViT's."""
        # A block has 12 width^2 weights: 4 in attention, 8 in the MLP.
        return 12 * width**2 * depth

    def count_extra_values(self, width: int) -> int:
        """Return about how many values are kept between steps besides the networks."""
        return 0
