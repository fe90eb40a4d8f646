"""Training a segmenter as a task of the training loop.

The state to resume is the step, the network with its running statistics and the optimizer. All
randomness is a function of (seed, step) or of (seed, epoch, image).
"""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mugs import distributed
from mugs.data.dense.ade20k import SceneFolder
from mugs.data.loading.order import SampleOrder
from mugs.data.loading.worker_batches import LabeledBatch
from mugs.devices import copy_to_device
from mugs.engine.layer_decay import build_adamw, build_dense_groups
from mugs.engine.model_task import ModelTask, prepare_model
from mugs.engine.precision import autocast
from mugs.engine.step import Losses
from mugs.transfer.schedules import PolySchedule
from mugs.transfer.segmentation.batches import iter_training_batches
from mugs.transfer.segmentation.config import SegmentationConfig
from mugs.transfer.segmentation.model import Segmenter, count_segmenter_flops


class SegmentationTraining(ModelTask[LabeledBatch]):
    """Trains a segmenter on scenes.

    Raises:
        ValueError: The batch does not divide over the ranks.
        DecodeError, SourceError: A scene cannot be used; the message names it.
    """

    label = "segmentation"
    model: Segmenter
    config: SegmentationConfig

    def __init__(
        self,
        model: Segmenter,
        scenes: SceneFolder,
        config: SegmentationConfig,
        run_dir: Path,
        device: torch.device,
    ) -> None:
        prepare_model(model, device)
        self.scenes = scenes
        # Fewer scenes than a batch are repeated to fill it.
        self.order = SampleOrder(
            len(scenes),
            seed=config.seed,
            world=distributed.world_size(),
            rank=distributed.rank(),
            batch_size=config.batch_size,
            steps_per_epoch=max(len(scenes) // config.batch_size, 1),
        )
        share = config.batch_size // distributed.world_size()
        self.mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        super().__init__(
            model,
            build_adamw(build_segmenter_groups(model, config)),
            PolySchedule(
                peak_lr=config.lr,
                total_steps=config.steps,
                weight_decay=config.weight_decay,
                warmup_steps=config.warmup_steps,
            ),
            config,
            run_dir,
            device,
            steps_per_epoch=self.order.steps_per_epoch,
            flops=count_segmenter_flops(model, config.scenes.crop),
        )

    def batches(self, start: int) -> Generator[LabeledBatch]:
        """Yield the crops of this rank."""
        return iter_training_batches(
            self.scenes,
            self.config.scenes,
            self.order,
            seed=self.config.seed,
            start=start,
            stop=self.total_steps,
            workers=self.config.workers,
        )

    def sample_ids(self, batch: LabeledBatch) -> Tensor:
        """Return the numbers of the scenes."""
        return batch.ids

    def backward(self, wrapped: nn.Module, batch: LabeledBatch, step: int) -> Losses:
        """Leave the gradients of the summed losses of the heads."""
        config = self.config
        self.model.set_draws(config.seed, step, config.batch_size, self.mine, self.device)
        with autocast(config.precision, self.device):
            outputs = wrapped(copy_to_device(batch.images, self.device))
        # Outside autocast: the loss resizes and sums logits in fp32.
        losses = self.model.loss(outputs, copy_to_device(batch.labels, self.device))
        total = torch.stack(list(losses.values())).sum()
        torch.autograd.backward(total)
        return total.detach(), {name: loss.detach() for name, loss in losses.items()}


def build_segmenter_groups(model: Segmenter, config: SegmentationConfig) -> list[dict[str, Any]]:
    """Build the parameter groups of a variant; iBOT's linear one decays its bias too."""
    decay = "all" if config.variant == "linear" else config.decay
    return build_dense_groups(model, model.backbone.vit, config.layer_decay, decay)
