"""One optimizer step of fine-tuning: mix, losses of all micro-batches, update."""

import numpy as np
import torch
from torch import Tensor, nn

from mugs.backbones.stochastic_depth import depth_uniforms
from mugs.engine.distributed import all_ranks
from mugs.engine.optim import clip_each, guarded_update, set_rates
from mugs.engine.precision import autocast
from mugs.engine.step import StepResult, synced
from mugs.finetune.batches import Batch
from mugs.finetune.classifier import Classifier
from mugs.finetune.config import FinetuneConfig
from mugs.finetune.mixing import group_size, mix_batch, soft_cross_entropy, soft_targets
from mugs.finetune.schedules import FinetuneSchedule


class FinetuneStep:
    """Advances classifier and optimizer by one step on this rank's columns of the global batch.

    `wrapped` is the classifier, or the same in DistributedDataParallel.
    """

    def __init__(
        self,
        model: Classifier,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: FinetuneSchedule,
        config: FinetuneConfig,
        columns: np.ndarray,
        *,
        num_classes: int,
        micro: int,
    ) -> None:
        self.model, self.wrapped, self.optimizer, self.schedule = model, wrapped, optimizer, schedule
        self.config, self.columns, self.num_classes, self.micro = config, columns, num_classes, micro
        self.parameters = list(model.parameters())
        self.rates = [branch.rate for branch in model.backbone.depth_branches()]

    def __call__(self, batch: Batch, step: int, device: torch.device) -> StepResult:
        """Run optimizer step `step`; one that is not finite on any rank changes nothing."""
        set_rates(self.optimizer, self.schedule, step)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(*self._mixed(batch, step, device), self._depth(step, device))
        norms = clip_each(self.parameters, 0.0)
        finite = all_ranks(torch.isfinite(norms).all() & torch.isfinite(loss))
        guarded_update(self.optimizer, finite)
        return StepResult(loss, {}, finite)

    def _mixed(self, batch: Batch, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images (N, 3, S, S) and soft targets (N, C) on the device."""
        options, config = self.config.mix, self.config
        images = batch.images.to(device, non_blocking=True)
        targets = soft_targets(batch.labels.to(device, non_blocking=True), self.num_classes, options.smoothing)
        if not options.on:
            return images, targets
        groups = self.columns % (config.batch_size // group_size(config.batch_size, options))
        return mix_batch(images, targets, groups, options, seed=config.seed, step=step)

    def _depth(self, step: int, device: torch.device) -> Tensor | None:
        """Stochastic-depth draws (branches, N) of this rank's images, cut out of those of the global batch."""
        if not any(self.rates):
            return None
        seed, size = self.config.seed, self.config.batch_size
        draws = depth_uniforms(seed, step, branches=len(self.rates), crops=1, batch_size=size)
        return draws[:, 0, torch.from_numpy(self.columns)].to(device)

    def _backward(self, images: Tensor, targets: Tensor, depth: Tensor | None) -> Tensor:
        """Gradients of the mean loss over this rank's images (and, through DDP, over ranks); returns the mean here."""
        loss = torch.zeros((), device=images.device)
        parts = range(0, len(images), self.micro)
        for first in parts:
            part = slice(first, first + self.micro)
            self.model.backbone.set_depth_uniforms(None if depth is None else depth[:, part])
            with synced(self.wrapped, last=first == parts[-1]), autocast(self.config.precision, images.device):
                share = soft_cross_entropy(self.wrapped(images[part]), targets[part]) / len(parts)
                torch.autograd.backward(share)
            loss += share.detach()
        return loss
