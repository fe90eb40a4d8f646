"""Training a detector as a task of the training loop.

State to resume is the step, the network with its running statistics and the optimizer: all randomness is a function of
(seed, epoch, image id).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mugs.batch_norm import synchronised
from mugs.engine import distributed
from mugs.engine.checkpoint import Parts
from mugs.engine.control import Control
from mugs.engine.loop import train
from mugs.engine.metering import Meter
from mugs.engine.optim import clip_each, guarded_update, load_optimizer, optimizer_tensors, set_rates
from mugs.engine.precision import allow_tf32, autocast
from mugs.engine.step import StepResult, synced
from mugs.engine.step_log import LogSettings, StepLog
from mugs.transfer.detection.batches import GroupedOrder, Pass, training_passes
from mugs.transfer.detection.coco import CocoSplit, trainable
from mugs.transfer.detection.detector import Detector, training_flops
from mugs.transfer.detection.targets import Targets
from mugs.transfer.detection.training_config import DetectionConfig, build_schedule
from mugs.transfer.detection.views import usual_size
from mugs.transfer.layer_decay import build_adamw


def train_detector(
    model: Detector,
    split: CocoSplit,
    config: DetectionConfig,
    run_dir: Path,
    device: torch.device,
    control: Control | None = None,
) -> None:
    """Train to the end, from the newest good checkpoint in `run_dir/checkpoints` when there is one.

    Raises ValueError when the batch does not divide over the ranks, NonFiniteError, CheckpointError, DecodeError or
    SourceError naming a bad file, StaleWriterError, and what `control.interrupted` raises.
    """
    task = DetectionTraining(model, split, config, run_dir, device)
    train(task, run_dir / "checkpoints", every=config.checkpoint_steps, control=control)


class DetectionTraining:
    """A detector on its images: the task that the loop of `mugs.engine.loop` trains."""

    def __init__(
        self, model: Detector, split: CocoSplit, config: DetectionConfig, run_dir: Path, device: torch.device
    ) -> None:
        allow_tf32(device)
        self.model, self.split, self.config, self.device = model, split, config, device
        synchronised(model.to(device), device).train()
        self.chosen = trainable(split, config.min_side)
        self.order = GroupedOrder(
            [split.images[i].width > split.images[i].height for i in self.chosen],
            seed=config.seed,
            world=distributed.world_size(),
            rank=distributed.rank(),
            batch_size=config.batch_size,
            images_per_pass=config.images_per_pass,
        )
        self.schedule = build_schedule(config, self.order.steps_per_epoch)
        self.total_steps = self.schedule.total_steps
        self.optimizer = build_adamw(model, model.pyramid.vit, config.layer_decay)
        share = config.batch_size // distributed.world_size()
        flops = share * training_flops(model, usual_size(config.scales, model.pyramid.strides[-1]))
        self.log = StepLog(run_dir, self._log_settings(), Meter(device, config.precision, flops))

    def _log_settings(self) -> LogSettings:
        return LogSettings(
            label="detection",
            total_steps=self.total_steps,
            steps_per_epoch=self.order.steps_per_epoch,
            batch_size=self.config.batch_size,
            log_steps=self.config.log_steps,
            seed=self.config.seed,
            rates=self.schedule.rates,
        )

    def steps(self, start: int) -> Iterator[None]:
        """One optimizer step per item: views -> losses of all passes -> update -> log."""
        wrapped = distributed.data_parallel(self.model)
        steps = training_passes(
            self.split,
            self.chosen,
            self.order,
            range(start, self.total_steps),
            scales=self.config.scales,
            multiple=self.model.pyramid.strides[-1],
            threads=self.config.threads,
        )
        self.log.open(start)
        with closing(self.log), closing(steps):  # type: ignore[type-var]
            for step in range(start, self.total_steps):
                waited = time.monotonic()
                passes = next(steps)
                waited = time.monotonic() - waited
                ids = torch.tensor([self.split.images[i].number for one in passes for i in one.indices])
                self.log.record(step, self._step(wrapped, passes, step), ids, waited)
                yield

    def _step(self, wrapped: nn.Module, passes: Sequence[Pass], step: int) -> StepResult:
        set_rates(self.optimizer, self.schedule, step)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for number, one in enumerate(passes):
            images = one.images.to(self.device, non_blocking=True)
            targets = [on_device(target, self.device) for target in one.targets]
            with synced(wrapped, last=number == len(passes) - 1), autocast(self.config.precision, self.device):
                losses = {name: value / len(passes) for name, value in wrapped(images, targets).items()}
                torch.autograd.backward(torch.stack(list(losses.values())).sum())
            sums = {name: sums.get(name, 0.0) + value.detach() for name, value in losses.items()}
        total = torch.stack(list(sums.values())).sum()
        norms = clip_each([p for group in self.optimizer.param_groups for p in group["params"]], 0.0)
        finite = distributed.all_ranks(torch.isfinite(norms).all() & torch.isfinite(total))
        guarded_update(self.optimizer, finite)
        return StepResult(total, sums, finite)

    def check(self) -> None:
        """Every step so far was finite."""
        self.log.check_finite()

    def parts(self) -> Parts:
        """Network and moments."""
        return {"detector": dict(self.model.state_dict()), "optimizer": optimizer_tensors(self.optimizer)}

    def notes(self) -> dict[str, Any]:
        """Nothing besides the tensors."""
        return {}

    def load(self, parts: Parts, notes: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.model.load_state_dict(parts["detector"])
        load_optimizer(self.optimizer, parts["optimizer"])


def on_device(target: Targets, device: torch.device) -> Targets:
    """The same objects on a device."""
    boxes, labels, masks = (x.to(device, non_blocking=True) for x in (target.boxes, target.labels, target.masks))
    return Targets(boxes, labels, masks, target.size, target.key)
