"""Fine-tuning as a task of the training loop.

    for step:  batch -> mix -> FinetuneStep -> log;  after each epoch: validation
State to resume is the step, the classifier, the optimizer and the results so far: all randomness is a function of
(seed, step) or (seed, epoch, sample, copy).
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mugs.data.source import Source
from mugs.engine import distributed
from mugs.engine.checkpoint import Parts
from mugs.engine.control import Control
from mugs.engine.loop import train
from mugs.engine.metering import Meter
from mugs.engine.optim import load_optimizer, optimizer_tensors
from mugs.engine.precision import allow_tf32
from mugs.engine.step_log import LogSettings, StepLog
from mugs.finetune.batches import Batches, Views, load_batches
from mugs.finetune.classifier import Classifier, parameter_groups
from mugs.finetune.config import FinetuneConfig
from mugs.finetune.mixing import columns_of
from mugs.finetune.schedules import build_schedule
from mugs.finetune.step import FinetuneStep
from mugs.finetune.validation import EpochResult, accuracy
from mugs.methods.flops import backbone_macs, linear_macs

logger = logging.getLogger(__name__)


def finetune(
    model: Classifier,
    sources: tuple[Source, Source],
    config: FinetuneConfig,
    run_dir: Path,
    device: torch.device,
    *,
    num_classes: int,
    control: Control | None = None,
) -> list[EpochResult]:
    """Train on the first source to the end, from the newest good checkpoint when there is one; returns the accuracy on
    the second after each epoch.

    Raises ValueError when the batch does not fit the ranks or the data, NonFiniteError, CheckpointError,
    StaleWriterError, and what `control.interrupted` raises.
    """
    task = Finetuning(model, sources, config, run_dir, device, num_classes)
    train(task, run_dir / "checkpoints", every=config.checkpoint_steps, control=control)
    return task.history


class Finetuning:
    """A classifier on its data: the task that the loop of `mugs.engine.loop` trains."""

    def __init__(
        self,
        model: Classifier,
        sources: tuple[Source, Source],
        config: FinetuneConfig,
        run_dir: Path,
        device: torch.device,
        num_classes: int,
    ) -> None:
        allow_tf32(device)
        (self.source, self.val), self.config, self.device, self.num_classes = sources, config, device, num_classes
        world = distributed.world_size()
        self.micro = micro_batch(config, world)
        self.batches = Batches(len(self.source), seed=config.seed, batch_size=config.batch_size, repeats=config.repeats)
        self.columns = columns_of(config.batch_size, config.mix, world, distributed.rank())
        self.schedule = build_schedule(config, self.batches.steps_per_epoch)
        self.total_steps = self.schedule.total_steps
        if config.rate.min_lr > config.peak_lr:
            logger.warning("min_lr %g exceeds the peak %g: the rate rises", config.rate.min_lr, config.peak_lr)
        self.model = model.to(device).train()
        self.optimizer = torch.optim.AdamW(parameter_groups(model, config.layer_decay), lr=0.0, fused=True)
        self.history: list[EpochResult] = []
        self.log = StepLog(run_dir, self._log_settings(), Meter(device, config.precision, self._flops()))

    def _log_settings(self) -> LogSettings:
        return LogSettings(
            label="finetune",
            total_steps=self.total_steps,
            steps_per_epoch=self.batches.steps_per_epoch,
            batch_size=self.config.batch_size,
            log_steps=self.config.log_steps,
            seed=self.config.seed,
            rates=self.schedule.rates,
        )

    def _flops(self) -> float:
        macs = backbone_macs(self.model.backbone.config, self.config.images.size) + linear_macs(self.model.head)
        return 6.0 * macs * len(self.columns)

    def steps(self, start: int) -> Iterator[None]:
        """One optimizer step per item; that of an epoch's last step includes the validation."""
        wrapped = distributed.data_parallel(self.model)
        advance = FinetuneStep(
            self.model,
            wrapped,
            self.optimizer,
            self.schedule,
            self.config,
            self.columns,
            num_classes=self.num_classes,
            micro=self.micro,
        )
        views = Views(self.source, self.config.images, self.config.seed)
        batches = load_batches(views, self.batches, self.columns, start, self.total_steps, self.config.workers)
        self.log.open(start)
        with closing(self.log), closing(batches):  # type: ignore[type-var]
            for step in range(start, self.total_steps):
                waited = time.monotonic()
                batch = next(batches)
                waited = time.monotonic() - waited
                self.log.record(step, advance(batch, step, self.device), batch.ids, waited)
                if self._validation_due(step):
                    self._validate(step)
                yield

    def _validation_due(self, step: int) -> bool:
        epochs, within = divmod(step + 1, self.batches.steps_per_epoch)
        return within == 0 and (epochs % self.config.validate_epochs == 0 or epochs == self.config.epochs)

    def _validate(self, step: int) -> None:
        self.log.check_finite()
        since = time.monotonic()
        top1, top5 = accuracy(self.model, self.val, self.config, self.device, 2 * self.micro)
        self.history.append(EpochResult(step // self.batches.steps_per_epoch, top1, top5))
        self.log.event({"step": step, **asdict(self.history[-1])}, time.monotonic() - since)

    def check(self) -> None:
        """Every step so far was finite."""
        self.log.check_finite()

    def parts(self) -> Parts:
        """Classifier and moments."""
        return {"model": dict(self.model.state_dict()), "optimizer": optimizer_tensors(self.optimizer)}

    def notes(self) -> dict[str, Any]:
        """The results so far."""
        return {"history": [asdict(result) for result in self.history]}

    def load(self, parts: Parts, notes: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.model.load_state_dict(parts["model"])
        load_optimizer(self.optimizer, parts["optimizer"])
        self.history = [EpochResult(**result) for result in notes["history"]]


def micro_batch(config: FinetuneConfig, world: int) -> int:
    """Images of a rank in one pass. Raises ValueError when they do not divide."""
    if config.batch_size % world:
        raise ValueError(f"batch_size {config.batch_size} does not divide over {world} ranks")
    share = config.batch_size // world
    micro = min(share, config.max_images_per_step or share)
    if share % micro:
        raise ValueError(f"{share} images per rank do not divide into micro-batches of {micro}")
    return micro
