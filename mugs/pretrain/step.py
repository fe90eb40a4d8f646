"""One optimizer step of a pretraining: losses of all micro-batches, state of the method, clip, update, teacher."""

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
    """A method with its optimizer and schedule; `step` advances all of them by one optimizer step."""

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        schedule: PretrainSchedule,
        config: StepConfig,
        student: nn.Module,
    ) -> None:
        self.method, self.optimizer, self.schedule, self.config = (
            method,
            optimizer,
            schedule,
            config,
        )
        self.student = student
        self.parameters = [p for p in method.student.parameters() if p.requires_grad]

    def step(
        self,
        micro_batches: Sequence[Views],
        step: int,
        uniforms: Sequence[Tensor | None] | None = None,
    ) -> StepResult:
        """Run optimizer step `step` on this rank's micro-batches; a non-finite step changes neither weights nor state.

        Everything is decided on the device: nothing waits for it.
        """
        epoch = step // self.schedule.steps_per_epoch
        apply_rate_schedule(self.optimizer, self.schedule, step)
        self.optimizer.zero_grad(set_to_none=True)
        total, losses, features = self._backward(micro_batches, epoch, uniforms)
        norms = clip_each_tensor(self.parameters, self.config.clip_at(epoch))
        finite = distributed.all_reduce_and(torch.isfinite(norms).all() & torch.isfinite(total))
        self.method.update_extra_state(features, finite)
        if epoch < self.config.freeze_prototypes_epochs:
            for parameter in self.method.last_layer_parameters():
                parameter.grad = None
        update_if_finite(self.optimizer, finite)
        self.method.update_teacher(self.schedule.teacher_momentum(step), finite)
        return StepResult(total, losses, finite)

    def _backward(
        self, micro_batches: Sequence[Views], epoch: int, uniforms: Sequence[Tensor | None] | None
    ) -> tuple[Tensor, dict[str, Tensor], list[Any]]:
        weights, share = self.method.loss_weights, 1.0 / len(micro_batches)
        sums: dict[str, Tensor] = {}
        features = []
        for index, views in enumerate(micro_batches):
            self.method.set_depth_uniforms(None if uniforms is None else uniforms[index])
            last = index == len(micro_batches) - 1
            with (
                sync_gradients(self.student, last=last),
                autocast(self.config.precision, views.large.device),
            ):
                losses, carried = self.method.compute_losses(self.student, views, epoch)
                total = weighted_mean_loss(losses, weights)
                torch.autograd.backward(total * share)
            features.append(carried)
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() * share
        return weighted_mean_loss(sums, weights), sums, features


def weighted_mean_loss(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """sum(w * loss) / sum(w). The release divides by the weights without multiplying (M5); equal at 1/1/1."""
    return torch.stack([weights[n] * v for n, v in losses.items()]).sum() / sum(
        weights[n] for n in losses
    )


def split_micro_batches(views: Views, micro: int) -> Iterator[Views]:
    """Micro-batches of `micro` images, in order."""
    for first in range(0, views.large.shape[1], micro):
        part = slice(first, first + micro)
        yield Views(views.large[:, part], views.small[:, part], views.weak[part])
