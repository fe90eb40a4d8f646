"""What the engine needs of a self-supervised method. It knows nothing else about one."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mugs.data.loading.batch import Views
from mugs.data.views.config import ViewRecipe


class Method(Protocol):
    """Networks, losses, teacher rule and extra state (queues, memories, centers) of a method."""

    loss_weights: dict[str, float]
    # A micro-batch would change the numbers, as with batch normalization.
    needs_whole_batch_per_rank: bool
    # Stochastic-depth branches of the student; 0 if its rate is 0.
    num_depth_branches: int

    @property
    def student(self) -> nn.Module:
        """Return the network that is trained."""

    @property
    def teacher(self) -> nn.Module:
        """Return the network that follows the student (its EMA)."""

    @property
    def extra_state(self) -> nn.Module:
        """Return the buffers besides the networks, which are equal on all ranks."""

    def to(self, device: torch.device) -> Any:
        """Move networks and state to a device."""

    def count_step_flops(self, recipe: ViewRecipe, num_images: int) -> int:
        """Return the floating-point operations of one step over `num_images` images."""

    def compute_losses(
        self, student: Callable[..., Any], views: Views, epoch: int
    ) -> tuple[dict[str, Tensor], Any]:
        """Return the losses of a micro-batch by name, and its features for `update_extra_state`.

        `student` is `self.student`, possibly wrapped for distributed training.
        """

    def update_extra_state(self, features: Sequence[Any], valid: Tensor) -> None:
        """Update queues, memories and center once per step, from all its micro-batches in order.

        Where `valid`, a boolean on the device, is false, the state stays as it is.
        """

    def update_teacher(self, momentum: float, valid: Tensor) -> None:
        """Move the teacher towards the student (EMA), unless `valid` is false."""

    def set_depth_uniforms(self, uniforms: Tensor | None) -> None:
        """Hand draws (num_depth_branches, student crops, N) for stochastic depth to the student."""

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that get no update in the first epochs."""
