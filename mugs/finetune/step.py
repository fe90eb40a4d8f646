"""The gradients of one step of fine-tuning: mix, losses of all micro-batches."""

import numpy as np
import torch
from torch import Tensor, nn

from mugs.backbones.stochastic_depth import depth_uniforms
from mugs.data.keyed import Batch
from mugs.engine.precision import autocast
from mugs.engine.step import synced
from mugs.finetune.classifier import Classifier
from mugs.finetune.config import FinetuneConfig
from mugs.finetune.mixing import group_size, mix_batch, soft_cross_entropy, soft_targets


class Gradients:
    """Leaves in the classifier the gradients of this rank's columns of the global batch."""

    def __init__(
        self, model: Classifier, config: FinetuneConfig, columns: np.ndarray, *, num_classes: int, micro: int
    ) -> None:
        self.model, self.config, self.columns, self.num_classes, self.micro = model, config, columns, num_classes, micro
        self.rates = [branch.rate for branch in model.backbone.depth_branches()]

    def __call__(self, wrapped: nn.Module, batch: Batch, step: int, device: torch.device) -> Tensor:
        """Gradients at step `step`; returns the mean loss. `wrapped` is the classifier or the same over ranks."""
        return self._backward(wrapped, *self._mixed(batch, step, device), self._depth(step, device))

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

    def _backward(self, wrapped: nn.Module, images: Tensor, targets: Tensor, depth: Tensor | None) -> Tensor:
        """Gradients of the mean loss over this rank's images (and, through DDP, over ranks); returns the mean here."""
        loss = torch.zeros((), device=images.device)
        parts = range(0, len(images), self.micro)
        for first in parts:
            part = slice(first, first + self.micro)
            self.model.backbone.set_depth_uniforms(None if depth is None else depth[:, part])
            with synced(wrapped, last=first == parts[-1]), autocast(self.config.precision, images.device):
                share = soft_cross_entropy(wrapped(images[part]), targets[part]) / len(parts)
                torch.autograd.backward(share)
            loss += share.detach()
        return loss
