"""Fine-tuning as a task of the training loop.

    for step:  batch -> mix -> gradients -> update -> log;  after each epoch: validation
State to resume is the step, the classifier, the optimizer and the results so far: all randomness is a function of
(seed, step) or (seed, epoch, sample, copy).
"""

import logging
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mugs import distributed
from mugs.checkpoint.save_load import StateDicts
from mugs.data.loading.worker_batches import LabeledBatch
from mugs.data.sources.base import Source
from mugs.engine.layer_decay import build_adamw
from mugs.engine.model_task import ModelTask, prepare_model
from mugs.engine.precision import autocast
from mugs.engine.step import Losses, compute_micro_batch_size, sync_gradients
from mugs.finetune.batches import AugmentedViews, BatchSampler, load_batches
from mugs.finetune.classifier import ImageClassifier, build_parameter_groups
from mugs.finetune.config import FinetuneConfig
from mugs.finetune.mixing import (
    assign_columns,
    mix_batch,
    resolve_group_size,
    smooth_labels,
    soft_cross_entropy,
)
from mugs.finetune.schedules import build_finetune_schedule
from mugs.finetune.validation import EpochAccuracy, evaluate_accuracy
from mugs.models.flops import backbone_macs, linear_macs
from mugs.models.stochastic_depth import draw_depth_uniforms

logger = logging.getLogger(__name__)


class Finetuning(ModelTask[LabeledBatch]):
    """A classifier, trained on the first source; `history` has the accuracy on the second after each epoch.

    Raises ValueError when the batch does not fit the ranks or the data.
    """

    label = "finetune"
    model: ImageClassifier
    config: FinetuneConfig

    def __init__(
        self,
        model: ImageClassifier,
        sources: tuple[Source, Source],
        config: FinetuneConfig,
        run_dir: Path,
        device: torch.device,
        num_classes: int,
    ) -> None:
        prepare_model(model, device)
        (self.source, self.val), self.num_classes = sources, num_classes
        self.micro = compute_micro_batch_size(config.batch_size, config.max_images_per_step)
        self.order = BatchSampler(
            len(self.source), seed=config.seed, batch_size=config.batch_size, repeats=config.repeats
        )
        self.columns = assign_columns(
            config.batch_size, config.mix, distributed.world_size(), distributed.rank()
        )
        self.drop_rates = [branch.rate for branch in model.backbone.stochastic_depth_layers()]
        self.history: list[EpochAccuracy] = []
        if config.rate.min_lr > config.peak_lr:
            logger.warning(
                "min_lr %g exceeds the peak %g: the rate rises", config.rate.min_lr, config.peak_lr
            )
        macs = backbone_macs(model.backbone.config, config.images.size) + linear_macs(model.head)
        super().__init__(
            model,
            build_adamw(build_parameter_groups(model, config.layer_decay)),
            build_finetune_schedule(config, self.order.steps_per_epoch),
            config,
            run_dir,
            device,
            steps_per_epoch=self.order.steps_per_epoch,
            flops=6.0 * macs,
        )

    def batches(self, start: int) -> Generator[LabeledBatch]:
        """Views of this rank."""
        views = AugmentedViews(self.source, self.config.images, self.config.seed)
        return load_batches(
            views, self.order, self.columns, start, self.total_steps, self.config.workers
        )

    def sample_ids(self, batch: LabeledBatch) -> Tensor:
        """Numbers of the images."""
        return batch.ids

    def backward(self, wrapped: nn.Module, batch: LabeledBatch, step: int) -> Losses:
        """Gradients of the mean loss over this rank's images, in micro-batches."""
        (images, targets), depth = self._mixed(batch, step), self._depth(step)
        loss = torch.zeros((), device=self.device)
        parts = range(0, len(images), self.micro)
        for first in parts:
            part = slice(first, first + self.micro)
            self.model.backbone.set_depth_uniforms(None if depth is None else depth[:, part])
            with (
                sync_gradients(wrapped, last=first == parts[-1]),
                autocast(self.config.precision, self.device),
            ):
                share = soft_cross_entropy(wrapped(images[part]), targets[part]) / len(parts)
                torch.autograd.backward(share)
            loss += share.detach()
        return loss, {}

    def _mixed(self, batch: LabeledBatch, step: int) -> tuple[Tensor, Tensor]:
        """Images (N, 3, S, S) and soft targets (N, C) on the device."""
        options, config = self.config.mix, self.config
        images = batch.images.to(self.device, non_blocking=True)
        targets = smooth_labels(
            batch.labels.to(self.device, non_blocking=True), self.num_classes, options.smoothing
        )
        if not options.on:
            return images, targets
        groups = self.columns % (
            config.batch_size // resolve_group_size(config.batch_size, options)
        )
        return mix_batch(images, targets, groups, options, seed=config.seed, step=step)

    def _depth(self, step: int) -> Tensor | None:
        """Stochastic-depth draws (branches, N) of this rank's images, cut out of those of the global batch."""
        if not any(self.drop_rates):
            return None
        seed, size = self.config.seed, self.config.batch_size
        draws = draw_depth_uniforms(
            seed, step, branches=len(self.drop_rates), crops=1, batch_size=size
        )
        return draws[:, 0, torch.from_numpy(self.columns)].to(self.device)

    def after_step(self, step: int) -> None:
        """Validation, after the last step of an epoch."""
        epochs, within = divmod(step + 1, self.order.steps_per_epoch)
        if within == 0 and (
            epochs % self.config.validate_epochs == 0 or epochs == self.config.epochs
        ):
            self._validate(step)

    def _validate(self, step: int) -> None:
        self.log.check_finite()
        since = time.monotonic()
        top1, top5 = evaluate_accuracy(
            self.model, self.val, self.config, self.device, 2 * self.micro
        )
        self.history.append(EpochAccuracy(step // self.order.steps_per_epoch, top1, top5))
        self.log.write_event({"step": step, **asdict(self.history[-1])}, time.monotonic() - since)

    def metadata(self) -> dict[str, Any]:
        """The results so far."""
        return {"history": [asdict(result) for result in self.history]}

    def load_state(self, parts: StateDicts, notes: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load_state(parts, notes)
        self.history = [EpochAccuracy(**result) for result in notes["history"]]
