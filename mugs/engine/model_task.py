"""The part that all trainings of one network with its optimizer share."""

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mugs import distributed
from mugs.checkpoint.save_load import StateDicts
from mugs.engine.loop import train
from mugs.engine.metering import Meter
from mugs.engine.optim import RateSchedule, flatten_optimizer_state, load_optimizer_state
from mugs.engine.step import Losses, run_train_step
from mugs.engine.step_log import LogSettings, StepLog
from mugs.models.batch_norm import convert_to_sync_batch_norm
from pipeline.control import Control

Batch = TypeVar("Batch")


class TaskSettings(Protocol):
    """The settings that such a training needs."""

    @property
    def batch_size(self) -> int:
        """Return the images of a step over all ranks."""

    @property
    def log_steps(self) -> int:
        """Return the steps between lines of the log."""

    @property
    def seed(self) -> int:
        """Return the seed of all randomness."""

    @property
    def precision(self) -> str:
        """Return "fp32" or "bf16"."""

    @property
    def checkpoint_steps(self) -> int:
        """Return the steps between checkpoints."""


class ModelTask(ABC, Generic[Batch]):
    """Base of tasks for `mugs.engine.loop`. A subclass gives the batches and their gradients."""

    label: str

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: RateSchedule,
        config: TaskSettings,
        run_dir: Path,
        device: torch.device,
        *,
        steps_per_epoch: int,
        flops: float,
    ) -> None:
        """Take a model after `prepare_model`, its optimizer, and the `flops` of one image."""
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.config = config
        self.run_dir = run_dir
        self.device = device
        self.total_steps = schedule.total_steps
        settings = LogSettings(
            label=self.label,
            total_steps=self.total_steps,
            steps_per_epoch=steps_per_epoch,
            batch_size=config.batch_size,
            log_steps=config.log_steps,
            seed=config.seed,
            rates=schedule.rates,
        )
        # `flops` is for one image; the meter wants this rank's share of a step.
        share = config.batch_size // distributed.world_size()
        self.log = StepLog(run_dir, settings, Meter(device, config.precision, share * flops))

    def train(self, control: Control | None = None) -> None:
        """Train to the end, from the newest good checkpoint in `run_dir/checkpoints`.

        Raises:
            NonFiniteError, CheckpointError, StaleWriterError: see `mugs.engine.loop.train`.
            Exception: whatever the batches or `control.interrupted` raise.
        """
        train(
            self, self.run_dir / "checkpoints", every=self.config.checkpoint_steps, control=control
        )

    @abstractmethod
    def batches(self, start: int) -> Generator[Batch]:
        """Yield this rank's batches from step `start` to the end."""

    @abstractmethod
    def sample_ids(self, batch: Batch) -> Tensor:
        """Return the numbers of the samples in a batch."""

    @abstractmethod
    def backward(self, wrapped: nn.Module, batch: Batch, step: int) -> Losses:
        """Leave the gradients of a batch in the network, which `wrapped` averages over ranks."""

    def after_step(self, step: int) -> None:
        """Do what follows a step once it is logged."""

    def steps(self, start: int) -> Generator[None]:
        """Make one optimizer step per item: batch -> gradients -> update -> log."""
        wrapped = distributed.wrap_data_parallel(self.model)
        batches = self.batches(start)
        self.log.open(start)
        # Closing the generator ends the loader, also when a step raises.
        with closing(self.log), closing(batches):
            for step in range(start, self.total_steps):
                # Seconds in which the device had nothing to do, because the loader was behind.
                waited = time.monotonic()
                batch = next(batches)
                waited = time.monotonic() - waited
                backward = partial(self.backward, wrapped, batch, step)
                result = run_train_step(self.optimizer, self.schedule, step, backward)
                self.log.record_step(step, result, self.sample_ids(batch), waited)
                self.after_step(step)
                yield

    def check_before_save(self) -> None:
        """Check that every step so far was finite."""
        self.log.check_finite()

    def state_dicts(self) -> StateDicts:
        """Return the network and the optimizer moments."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": flatten_optimizer_state(self.optimizer),
        }

    def metadata(self) -> dict[str, Any]:
        """Return nothing besides the tensors."""
        return {}

    def load_state(self, parts: StateDicts, notes: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.model.load_state_dict(parts["model"])
        load_optimizer_state(self.optimizer, parts["optimizer"])


def prepare_model(model: nn.Module, device: torch.device) -> None:
    """Put a model in training mode on its device, with batch statistics of all ranks."""
    convert_to_sync_batch_norm(model.to(device), device).train()
