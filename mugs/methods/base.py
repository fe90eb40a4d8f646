"""What the engine asks of a self-supervised method; it knows nothing else about one."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mugs.data.loading.batch import Views
from mugs.data.views.config import ViewRecipe


class Method(Protocol):
    """Networks, losses, teacher rule and extra state (queues, memories, centres) of one method."""

    loss_weights: dict[str, float]
    needs_whole_batch_per_rank: (
        bool  # a micro-batch would change the numbers, as with batch normalisation
    )
    num_depth_branches: int  # stochastic-depth branches of the student, 0 when its rate is 0

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""

    @property
    def teacher(self) -> nn.Module:
        """The network that follows it."""

    @property
    def extra_state(self) -> nn.Module:
        """Buffers besides the networks', equal on all ranks."""

    def to(self, device: torch.device) -> Any:
        """Move networks and state to a device."""

    def count_step_flops(self, recipe: ViewRecipe, num_images: int) -> int:
        """Return the floating-point operations of one step over `num_images` images."""

    def compute_losses(
        self, student: Callable[..., Any], views: Views, epoch: int
    ) -> tuple[dict[str, Tensor], Any]:
        """The losses of a micro-batch by name, and the features that `refresh` wants of it.

        `student` is `self.student`, possibly wrapped for distributed training.
        """

    def update_extra_state(self, features: Sequence[Any], valid: Tensor) -> None:
        """Update the extra state once per optimizer step from the features of all its micro-batches, in order.

        Where `valid`, a boolean on the device, is false, the state stays as it is.
        """

    def update_teacher(self, momentum: float, valid: Tensor) -> None:
        """Move the teacher towards the student, unless `valid` is false."""

    def set_depth_uniforms(self, uniforms: Tensor | None) -> None:
        """Hand the student (depth_branches, student crops, N) draws for stochastic depth."""

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """Parameters that stay frozen in the first epochs."""
