"""One optimizer step of pretraining.

    for each micro-batch:  losses -> backward
    clip -> agree that all is finite -> the method's extra state -> AdamW -> EMA of the teacher

Fine-tuning and the dense tasks have no teacher and no state; `mugs.engine.step` has their step.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mugs import distributed
from mugs.data.loading.batch import Views
from mugs.engine.optim import apply_rate_schedule, clip_each_tensor, update_if_finite
from mugs.engine.precision import autocast
from mugs.engine.step import StepResult, sync_gradients
from mugs.methods.base import Method
from mugs.pretrain.config import StepConfig
from mugs.pretrain.schedule import PretrainSchedule


class Trainer:
    """A method with its optimizer and schedule. `step` advances all of them by one step."""

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        schedule: PretrainSchedule,
        config: StepConfig,
        student: nn.Module,
    ) -> None:
        self.method = method
        self.optimizer = optimizer
        self.schedule = schedule
        self.config = config
        self.student = student
        self.parameters = [p for p in method.student.parameters() if p.requires_grad]

    def step(
        self,
        micro_batches: Sequence[Views],
        step: int,
        uniforms: Sequence[Tensor | None] | None = None,
    ) -> StepResult:
        """Run optimizer step `step` on this rank's micro-batches.

        A step that is not finite on any rank changes neither the student nor the extra state. The
        decision is made on the device, so the host never waits for it. A teacher that moves before
        its pass (`Method.before_forward`) has moved already; the run stops at such a step and
        resumes from a checkpoint before it.
        """
        epoch = step // self.schedule.steps_per_epoch
        apply_rate_schedule(self.optimizer, self.schedule, step)
        self.optimizer.zero_grad(set_to_none=True)
        momentum = self.schedule.teacher_momentum(step)
        self.method.before_forward(momentum)
        total, losses, features = self._backward(micro_batches, epoch, uniforms)

        # A NaN or infinity in any gradient shows in the norm of its tensor.
        norms = clip_each_tensor(self.parameters, self.config.clip_at(epoch))
        finite = distributed.all_reduce_and(torch.isfinite(norms).all() & torch.isfinite(total))
        self.method.update_extra_state(features, finite)

        # After clipping, as released. Without a gradient AdamW neither moves nor decays the
        # prototypes, and their bias correction starts when they are released.
        if epoch < self.config.freeze_prototypes_epochs:
            for parameter in self.method.last_layer_parameters():
                parameter.grad = None

        update_if_finite(self.optimizer, finite)
        self.method.after_step(momentum, finite)
        return StepResult(total, losses, finite)

    def _backward(
        self, micro_batches: Sequence[Views], epoch: int, uniforms: Sequence[Tensor | None] | None
    ) -> tuple[Tensor, dict[str, Tensor], list[Any]]:
        weights = self.method.loss_weights
        share = 1.0 / len(micro_batches)  # micro-batches are equally large
        sums: dict[str, Tensor] = {}
        features = []
        for index, views in enumerate(micro_batches):
            self.method.set_depth_uniforms(None if uniforms is None else uniforms[index])
            last = index == len(micro_batches) - 1
            with sync_gradients(self.student, last=last):
                with autocast(self.config.precision, views.large.device):
                    losses, carried = self.method.compute_losses(self.student, views, epoch)
                    self.method.check_depth_uniforms()
                    total = sum_weighted_losses(losses, weights)
                # Outside: autocast would turn products of fp32 losses into bf16 going back.
                torch.autograd.backward(total * share)
            features.append(carried)
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() * share
        return sum_weighted_losses(sums, weights), sums, features


def sum_weighted_losses(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Return sum(w * loss).

    A method that wants a mean publishes weights that sum to one. Dividing here would halve the sum
    of two losses, and with it every gradient that is clipped.
    """
    return torch.stack([weights[name] * value for name, value in losses.items()]).sum()


def split_micro_batches(views: Views, micro: int) -> Iterator[Views]:
    """Yield micro-batches of `micro` images, in order."""
    for first in range(0, views.large.shape[1], micro):
        part = slice(first, first + micro)
        extras = {name: value[part] for name, value in views.extras.items()}
        yield Views(views.large[:, part], views.small[:, part], extras)
