"""Training a segmenter as a task of the training loop.

State to resume is the step, the network with its running statistics and the optimizer: all randomness is a function of
(seed, step) or (seed, epoch, image).
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mugs.batch_norm import synchronised
from mugs.data.order import Order
from mugs.engine import distributed
from mugs.engine.checkpoint import Parts
from mugs.engine.control import Control
from mugs.engine.loop import train
from mugs.engine.metering import Meter
from mugs.engine.optim import clip_each, guarded_update, load_optimizer, optimizer_tensors, set_rates
from mugs.engine.precision import allow_tf32, autocast
from mugs.engine.step import StepResult
from mugs.engine.step_log import LogSettings, StepLog
from mugs.transfer.layer_decay import build_adamw
from mugs.transfer.schedules import PolySchedule
from mugs.transfer.segmentation.batches import Batch, training_batches
from mugs.transfer.segmentation.config import SegmentationConfig
from mugs.transfer.segmentation.model import Segmenter, training_flops
from mugs.transfer.segmentation.scenes import SceneFolder


def train_segmenter(
    model: Segmenter,
    scenes: SceneFolder,
    config: SegmentationConfig,
    run_dir: Path,
    device: torch.device,
    control: Control | None = None,
) -> None:
    """Train to the end, from the newest good checkpoint in `run_dir/checkpoints` when there is one.

    Raises ValueError when the batch does not divide over the ranks, NonFiniteError, CheckpointError, DecodeError or
    SourceError naming a bad file, StaleWriterError, and what `control.interrupted` raises.
    """
    task = SegmentationTraining(model, scenes, config, run_dir, device)
    train(task, run_dir / "checkpoints", every=config.checkpoint_steps, control=control)
    model.clear_draws()


class SegmentationTraining:
    """A segmenter on its scenes: the task that the loop of `mugs.engine.loop` trains."""

    def __init__(
        self, model: Segmenter, scenes: SceneFolder, config: SegmentationConfig, run_dir: Path, device: torch.device
    ) -> None:
        allow_tf32(device)
        self.model, self.scenes, self.config, self.device = model, scenes, config, device
        share = config.batch_size // distributed.world_size()
        meter = Meter(device, config.precision, share * training_flops(model, config.scenes.crop))
        synchronised(model.to(device), device).train()
        self.total_steps = config.steps
        self.order = scene_order(len(scenes), config)
        self.mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        self.optimizer = build_adamw(model, model.backbone.vit, config.layer_decay)
        self.schedule = PolySchedule(
            peak_lr=config.lr,
            total_steps=config.steps,
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup_steps,
        )
        self.log = StepLog(run_dir, self._log_settings(), meter)

    def _log_settings(self) -> LogSettings:
        return LogSettings(
            label="segmentation",
            total_steps=self.total_steps,
            steps_per_epoch=self.order.steps_per_epoch,
            batch_size=self.config.batch_size,
            log_steps=self.config.log_steps,
            seed=self.config.seed,
            rates=self.schedule.rates,
        )

    def steps(self, start: int) -> Iterator[None]:
        """One optimizer step per item: crops -> losses of the heads -> update -> log."""
        config, wrapped = self.config, distributed.data_parallel(self.model)
        batches = training_batches(
            self.scenes,
            config.scenes,
            self.order,
            seed=config.seed,
            start=start,
            stop=self.total_steps,
            workers=config.workers,
        )
        self.log.open(start)
        with closing(self.log), closing(batches):  # type: ignore[type-var]
            for step in range(start, self.total_steps):
                waited = time.monotonic()
                batch = next(batches)
                waited = time.monotonic() - waited
                self.log.record(step, self._step(wrapped, batch, step), batch.ids, waited)
                yield

    def _step(self, wrapped: nn.Module, batch: Batch, step: int) -> StepResult:
        config, device = self.config, self.device
        set_rates(self.optimizer, self.schedule, step)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.set_draws(config.seed, step, config.batch_size, self.mine, device)
        images, labels = (x.to(device, non_blocking=True) for x in (batch.images, batch.labels))
        with autocast(config.precision, device):
            outputs = wrapped(images)
        losses = self.model.loss(outputs, labels)
        total = torch.stack(list(losses.values())).sum()
        torch.autograd.backward(total)
        norms = clip_each([p for group in self.optimizer.param_groups for p in group["params"]], 0.0)
        finite = distributed.all_ranks(torch.isfinite(norms).all() & torch.isfinite(total.detach()))
        guarded_update(self.optimizer, finite)
        return StepResult(total.detach(), {name: loss.detach() for name, loss in losses.items()}, finite)

    def check(self) -> None:
        """Every step so far was finite."""
        self.log.check_finite()

    def parts(self) -> Parts:
        """Network and moments."""
        return {"segmenter": dict(self.model.state_dict()), "optimizer": optimizer_tensors(self.optimizer)}

    def notes(self) -> dict[str, Any]:
        """Nothing besides the tensors."""
        return {}

    def load(self, parts: Parts, notes: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.model.load_state_dict(parts["segmenter"])
        load_optimizer(self.optimizer, parts["optimizer"])


def scene_order(num_scenes: int, config: SegmentationConfig) -> Order:
    """The order of scenes; fewer than a batch are repeated to fill one."""
    return Order(
        num_scenes,
        seed=config.seed,
        world=distributed.world_size(),
        rank=distributed.rank(),
        batch_size=config.batch_size,
        steps_per_epoch=max(num_scenes // config.batch_size, 1),
    )
