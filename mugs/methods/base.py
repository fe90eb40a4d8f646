"""What the engine asks of a self-supervised method; it knows nothing else about one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Views:
    """Crops of N images, crop-major; large ones are teacher 0, teacher 1, student 0, student 1.

    large (4, N, 3, S, S) and small (P, N, 3, s, s), normalised floats; weak (N,): the student's large crops were
    drawn weakly.
    """

    large: Tensor
    small: Tensor
    weak: Tensor


class Method(Protocol):
    """Networks, losses, teacher rule and extra state (queues, memories, centres) of one method."""

    student: nn.Module
    teacher: nn.Module
    extra_state: nn.Module
    loss_weights: dict[str, float]

    def losses(self, student: Callable[..., Any], views: Views, epoch: int) -> tuple[dict[str, Tensor], Any]:
        """The losses of a micro-batch by name, and the features that `refresh` wants of it.

        `student` is `self.student`, possibly wrapped for distributed training.
        """

    def refresh(self, features: Sequence[Any]) -> None:
        """Update the extra state once per optimizer step from the features of all its micro-batches, in order."""

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student."""

    def set_depth_uniforms(self, uniforms: Tensor | None) -> None:
        """Hand the student (2 * depth, student crops, N) draws for stochastic depth."""

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """Parameters that stay frozen in the first epochs."""
