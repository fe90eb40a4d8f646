"""Fine-tuning as a task of the training loop.

    for step:  batch -> mix -> gradients -> update -> log;  after each epoch: validation

The state to resume is the step, the classifier, the optimizer and the results so far. All
randomness is a function of (seed, step) or of (seed, epoch, sample, copy).
"""

import logging
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mugs import distributed
from mugs.checkpoint.save_load import StateDicts
from mugs.data.loading.evaluation import iter_eval_batches
from mugs.data.loading.worker_batches import LabeledBatch
from mugs.data.sources.base import Source
from mugs.devices import copy_to_device
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
from mugs.finetune.schedules import FinetuneSchedule
from mugs.models.flops import count_image_flops
from mugs.models.stochastic_depth import draw_depth_uniforms

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpochAccuracy:
    """Validation accuracy after an epoch, in percent."""

    epoch: int
    top1: float
    top5: float


class Finetuning(ModelTask[LabeledBatch]):
    """Trains a classifier on the first source; `history` has the accuracy on the second one.

    Raises:
        ValueError: The batch does not fit the ranks or the data.
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
        self.source, self.validation_source = sources
        self.num_classes = num_classes
        self.micro = compute_micro_batch_size(config.batch_size, config.micro_batch_size)
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
            )  # as in the released 1% and CIFAR-10 runs (E11)
        super().__init__(
            model,
            build_adamw(
                build_parameter_groups(model, config.layer_decay, decay_tokens=config.decay_tokens)
            ),
            FinetuneSchedule(config, self.order.steps_per_epoch),
            config,
            run_dir,
            device,
            steps_per_epoch=self.order.steps_per_epoch,
            flops=count_image_flops(model, config.images.size),
        )

    def batches(self, start: int) -> Generator[LabeledBatch]:
        """Yield the views of this rank."""
        return load_batches(
            AugmentedViews(self.source, self.config.images, self.config.seed),
            self.order,
            self.columns,
            start,
            self.total_steps,
            self.config.workers,
        )

    def sample_ids(self, batch: LabeledBatch) -> Tensor:
        """Return the numbers of the images."""
        return batch.ids

    def backward(self, wrapped: nn.Module, batch: LabeledBatch, step: int) -> Losses:
        """Leave the gradients of the mean loss over this rank's images, in micro-batches."""
        # Mixing and stochastic depth are drawn for the whole batch and then cut, so that neither
        # micro-batches nor ranks change a number.
        images, targets = self._mix(batch, step)
        depth = self._draw_depth(step)
        loss = torch.zeros((), device=self.device)
        parts = range(0, len(images), self.micro)
        for first in parts:
            part = slice(first, first + self.micro)
            self.model.backbone.set_depth_uniforms(None if depth is None else depth[:, part])
            # Divided by the number of parts: the sum of their means is the mean over all images.
            with sync_gradients(wrapped, last=first == parts[-1]):
                with autocast(self.config.precision, self.device):
                    logits = wrapped(images[part])
                # Outside: autocast would turn fp32 products into bf16 going back.
                share = soft_cross_entropy(logits, targets[part]) / len(parts)
                torch.autograd.backward(share)
            loss += share.detach()
        return loss, {}

    def _mix(self, batch: LabeledBatch, step: int) -> tuple[Tensor, Tensor]:
        """Return images (N, 3, S, S) and soft targets (N, C) on the device."""
        config = self.config
        options = config.mix
        images = copy_to_device(batch.images, self.device)
        labels = copy_to_device(batch.labels, self.device)
        targets = smooth_labels(labels, self.num_classes, options.smoothing)
        if not options.on:
            return images, targets
        # Group g has the columns g, g + G, g + 2 G, ... (see `assign_columns`).
        groups = self.columns % (
            config.batch_size // resolve_group_size(config.batch_size, options)
        )
        return mix_batch(images, targets, groups, options, seed=config.seed, step=step)

    def _draw_depth(self, step: int) -> Tensor | None:
        """Return this rank's columns of the stochastic-depth draws, (branches, N) on the CPU."""
        if not any(self.drop_rates):
            return None
        draws = draw_depth_uniforms(
            self.config.seed,
            step,
            branches=len(self.drop_rates),
            crops=1,
            batch_size=self.config.batch_size,
        )
        return draws[:, 0, torch.from_numpy(self.columns)]

    def after_step(self, step: int) -> None:
        """Validate after every `validate_epochs`-th epoch and after the last one."""
        epochs, within = divmod(step + 1, self.order.steps_per_epoch)
        is_due = epochs % self.config.validate_epochs == 0 or epochs == self.config.epochs
        if within != 0 or not is_due:
            return
        # First, because the accuracy of weights that are about to be rejected means nothing.
        self.log.check_finite()
        since = time.monotonic()
        # Without gradients, twice the images of a micro-batch fit into memory.
        top1, top5 = evaluate_accuracy(
            self.model, self.validation_source, self.config, self.device, 2 * self.micro
        )
        self.history.append(EpochAccuracy(step // self.order.steps_per_epoch, top1, top5))
        self.log.write_event({"step": step, **asdict(self.history[-1])}, time.monotonic() - since)

    def metadata(self) -> dict[str, Any]:
        """Return the results so far."""
        return {"history": [asdict(result) for result in self.history]}

    def load_state(self, parts: StateDicts, notes: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load_state(parts, notes)
        self.history = [EpochAccuracy(**result) for result in notes["history"]]


@torch.no_grad()
def evaluate_accuracy(
    model: ImageClassifier,
    source: Source,
    config: FinetuneConfig,
    device: torch.device,
    batch_size: int,
) -> tuple[float, float]:
    """Return top-1 and top-5 in percent, and leave the model in training mode."""
    model.eval()
    model.backbone.set_depth_uniforms(None)  # no stochastic depth
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    batches = iter_eval_batches(
        source,
        resize=config.images.resize,
        crop=config.images.size,
        interpolation=config.images.eval_interpolation,
        batch_size=batch_size,
        # Every world-th image: none is repeated to make the ranks equal, so the result is exact.
        indices=range(distributed.rank(), len(source), distributed.world_size()),
        threads=max(config.workers, 1),
        device=device,
    )
    for images, labels, _ in batches:
        with autocast(config.precision, device):
            scores = model(images)
        top = scores.topk(min(5, scores.shape[1]), dim=1).indices
        hit = top == copy_to_device(labels, device)[:, None]
        hits += torch.stack([hit[:, 0].sum(), hit.any(dim=1).sum()])
    model.train()
    top1, top5 = distributed.all_gather_rows(hits[None]).sum(dim=0).tolist()
    return 100 * top1 / len(source), 100 * top5 / len(source)
