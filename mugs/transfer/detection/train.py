"""Training a detector as a task of the training loop.

The state to resume is the step, the network with its running statistics and the optimizer. All
randomness is a function of (seed, epoch, image id).
"""

from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor, nn

from mugs import distributed
from mugs.data.dense.coco import CocoSplit, trainable_indices
from mugs.devices import copy_to_device
from mugs.engine.layer_decay import build_adamw, build_dense_groups
from mugs.engine.model_task import ModelTask, prepare_model
from mugs.engine.precision import autocast
from mugs.engine.step import Losses, sync_gradients
from mugs.transfer.detection.batches import AspectGroupedOrder, MicroBatch, iter_micro_batches
from mugs.transfer.detection.boxes import Targets
from mugs.transfer.detection.config import DetectionConfig
from mugs.transfer.detection.detector import Detector, count_detector_flops
from mugs.transfer.detection.views import typical_view_size
from mugs.transfer.schedules import StepSchedule


class DetectionTraining(ModelTask[list[MicroBatch]]):
    """Trains a detector on the images of a COCO split.

    Raises:
        ValueError: The batch does not divide over the ranks.
        DecodeError, SourceError: An image cannot be used; the message names it.
    """

    label = "detection"
    config: DetectionConfig

    def __init__(
        self,
        model: Detector,
        split: CocoSplit,
        config: DetectionConfig,
        run_dir: Path,
        device: torch.device,
    ) -> None:
        prepare_model(model, device)
        vit = model.pyramid.vit
        self.split = split
        self.multiple = model.pyramid.strides[-1]  # sides of a batch are multiples of this
        self.chosen = trainable_indices(split, config.min_side)
        self.order = AspectGroupedOrder(
            [split.images[i].width > split.images[i].height for i in self.chosen],
            seed=config.seed,
            world=distributed.world_size(),
            rank=distributed.rank(),
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
        )
        super().__init__(
            model,
            build_adamw(build_dense_groups(model, vit, config.layer_decay, config.decay)),
            build_detection_schedule(config, self.order.steps_per_epoch),
            config,
            run_dir,
            device,
            steps_per_epoch=self.order.steps_per_epoch,
            flops=count_detector_flops(model, typical_view_size(config.scales, self.multiple)),
        )

    def batches(self, start: int) -> Generator[list[MicroBatch]]:
        """Yield the micro-batches of this rank, one list per step."""
        return iter_micro_batches(
            self.split,
            self.chosen,
            self.order,
            range(start, self.total_steps),
            scales=self.config.scales,
            multiple=self.multiple,
            threads=self.config.threads,
        )

    def sample_ids(self, batch: list[MicroBatch]) -> Tensor:
        """Return COCO's ids of the images."""
        return torch.tensor([self.split.images[i].number for one in batch for i in one.indices])

    def backward(self, wrapped: nn.Module, batch: list[MicroBatch], step: int) -> Losses:
        """Leave the gradients of the summed losses, averaged over the micro-batches."""
        sums: dict[str, Tensor] = {}
        for number, one in enumerate(batch):
            images = copy_to_device(one.images, self.device)
            targets = [on_device(target, self.device) for target in one.targets]
            with sync_gradients(wrapped, last=number == len(batch) - 1):
                with autocast(self.config.precision, self.device):
                    losses = {
                        name: value / len(batch) for name, value in wrapped(images, targets).items()
                    }
                # Each micro-batch has a backward pass of its own, which frees its activations. It
                # is outside autocast, which would turn products of fp32 losses into bf16.
                torch.autograd.backward(torch.stack(list(losses.values())).sum())
            sums = {name: sums.get(name, 0.0) + value.detach() for name, value in losses.items()}
        return torch.stack(list(sums.values())).sum(), sums


def on_device(target: Targets, device: torch.device) -> Targets:
    """Copy objects to a device."""
    boxes, labels, masks = (
        copy_to_device(x, device) for x in (target.boxes, target.labels, target.masks)
    )
    return Targets(boxes, labels, masks, target.size, target.key)


def build_detection_schedule(config: DetectionConfig, steps_per_epoch: int) -> StepSchedule:
    """Return the schedule of a run."""
    return StepSchedule(
        peak_lr=config.lr,
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
        weight_decay=config.weight_decay,
        decay_epochs=config.decay_epochs,
        warmup_steps=config.warmup_steps,
        warmup_start=config.warmup_start,
    )
