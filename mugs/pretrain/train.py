"""Pretraining as a task of the training loop. It knows no method.

    for step:  batch -> views on the device -> Trainer.step -> metrics, progress

A checkpoint holds step, networks, optimizer and the method's extra state. All randomness is a
function of (seed, step) or (seed, epoch, sample), so no generator state is needed to resume.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mugs import distributed
from mugs.checkpoint.save_load import SavePolicy, StateDicts
from mugs.data.loading.device import DeviceTransform
from mugs.data.loading.loader import make_loader
from mugs.data.loading.order import SampleOrder
from mugs.data.sources.base import Source
from mugs.devices import use_deterministic_algorithms
from mugs.engine.loop import train
from mugs.engine.metering import Meter, TraceProfiler
from mugs.engine.optim import build_pretrain_adamw, flatten_optimizer_state, load_optimizer_state
from mugs.engine.step import compute_micro_batch_size
from mugs.engine.step_log import LogSettings, StepLog
from mugs.methods.base import Method
from mugs.methods.calibration import load_calibration_targets
from mugs.models.stochastic_depth import draw_depth_uniforms
from mugs.pretrain.agreement import check_equal_on_all_ranks
from mugs.pretrain.config import TrainConfig
from mugs.pretrain.schedule import PretrainSchedule
from mugs.pretrain.step import Trainer, split_micro_batches
from pipeline.control import Control


def pretrain(
    method: Method,
    source: Source,
    config: TrainConfig,
    run_dir: Path,
    device: torch.device,
    control: Control | None = None,
) -> None:
    """Train to the end, from the newest good checkpoint in `run_dir/checkpoints` when there is one.

    Raises ValueError when the batch does not divide over the ranks, NonFiniteError,
    StateMismatchError, CheckpointError, StaleWriterError, and what `control.interrupted` raises.
    """
    task = PretrainTask(method, source, config, run_dir, device)
    policy = SavePolicy(
        keep=config.keep_checkpoints,
        milestone_steps=config.keep_every_epochs * task.order.steps_per_epoch,
        retry_seconds=60 * config.checkpoint_retry_minutes,
    )
    train(
        task, run_dir / "checkpoints", every=config.checkpoint_steps, policy=policy, control=control
    )


class PretrainTask:
    """A method on its data: the task that `mugs.engine.loop.train` runs."""

    def __init__(
        self,
        method: Method,
        source: Source,
        config: TrainConfig,
        run_dir: Path,
        device: torch.device,
    ) -> None:
        self.order, self.micro = plan_batches(len(source), config)
        if (
            method.config.needs_whole_batch_per_rank
            and self.micro * distributed.world_size() < config.batch_size
        ):
            raise ValueError(
                f"micro_batch_size {config.micro_batch_size}: this method needs each rank's "
                f"{config.batch_size // distributed.world_size()} images at once; "
                "unset it or use more ranks"
            )
        if config.deterministic:
            use_deterministic_algorithms()
            for network in (method.student, method.teacher):
                network.backbone.resize_by_product = True
        self.method = method
        self.source = source
        self.config = config
        self.run_dir = run_dir
        self.device = device
        self.schedule = build_pretrain_schedule(config, self.order.steps_per_epoch)
        self.total_steps = self.schedule.total_steps
        # The optimizer keeps references to the parameters, so they move to the device first.
        method.to(device)
        self.optimizer = build_pretrain_adamw(
            method.student, config.patch_lr_scale, decay=config.decay
        )
        flops = method.count_step_flops(config.views, config.batch_size // distributed.world_size())
        meter = Meter(device, config.precision, flops)
        self.log = StepLog(run_dir, build_log_settings(config, self.schedule), meter)

    def steps(self, start: int) -> Iterator[None]:
        """Make one optimizer step per item: batch -> views on the device -> step -> log."""
        check_equal_on_all_ranks(self.method.extra_state)
        config = self.config
        student = distributed.wrap_data_parallel(self.method.student)
        trainer = Trainer(self.method, self.optimizer, self.schedule, config, student)
        loader = make_loader(
            self.source,
            config.views,
            self.order,
            seed=config.seed,
            loader=config.loader,
            renderer=config.renderer,
            threads=config.threads,
            annotate=self.method.annotate,
        )
        stage = DeviceTransform(self.device, config.views)
        trace = TraceProfiler(self.run_dir / "trace", config.trace_steps)
        self.log.open(start)
        with closing(loader), closing(self.log), closing(trace):
            batches = iter(loader.iterate(start, self.total_steps))
            for step in range(start, self.total_steps):
                # Seconds in which the device had nothing to do, because the loader was behind.
                waited = time.monotonic()
                batch = next(batches)
                waited = time.monotonic() - waited
                views = list(split_micro_batches(stage(batch), self.micro))
                masks = draw_micro_batch_uniforms(self.method, config, step, self.micro)
                result = trainer.step(views, step, masks)
                self.log.record_step(step, result, batch.ids, waited)
                trace.step()
                yield

    def check_before_save(self) -> None:
        """Check that every step was finite, and that all ranks hold the same extra state."""
        self.log.check_finite()
        check_equal_on_all_ranks(self.method.extra_state)

    def state_dicts(self) -> StateDicts:
        """Return networks, optimizer moments and the method's extra state."""
        return {
            "student": dict(self.method.student.state_dict()),
            "teacher": dict(self.method.teacher.state_dict()),
            "extra_state": dict(self.method.extra_state.state_dict()),
            "optimizer": flatten_optimizer_state(self.optimizer),
        }

    def metadata(self) -> dict[str, Any]:
        """Return the log's sums of the current epoch."""
        return self.log.metadata()

    def load_state(self, parts: StateDicts, notes: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.method.student.load_state_dict(parts["student"])
        self.method.teacher.load_state_dict(parts["teacher"])
        self.method.extra_state.load_state_dict(parts["extra_state"])
        load_optimizer_state(self.optimizer, parts["optimizer"])
        self.log.load_state(notes)


def plan_batches(num_images: int, config: TrainConfig) -> tuple[SampleOrder, int]:
    """Return the order of the samples, and the images of this rank in one micro-batch."""
    micro = compute_micro_batch_size(config.batch_size, config.micro_batch_size)
    order = SampleOrder(
        num_images,
        seed=config.seed,
        world=distributed.world_size(),
        rank=distributed.rank(),
        batch_size=config.batch_size,
        steps_per_epoch=config.steps_per_epoch,
    )
    return order, micro


def build_pretrain_schedule(config: TrainConfig, steps_per_epoch: int) -> PretrainSchedule:
    """Build the schedules of the run."""
    return PretrainSchedule(
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        peak_lr=config.peak_lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay[0],
        weight_decay_end=config.weight_decay[1],
        momentum=config.teacher_momentum,
    )


def build_log_settings(config: TrainConfig, schedule: PretrainSchedule) -> LogSettings:
    """Build the settings of the log."""
    return LogSettings(
        label="pretrain",
        total_steps=schedule.total_steps,
        steps_per_epoch=schedule.steps_per_epoch,
        batch_size=config.batch_size,
        log_steps=config.log_steps,
        seed=config.seed,
        rates=schedule.rates,
        targets=load_calibration_targets(config.calibration),
    )


def draw_micro_batch_uniforms(
    method: Method, config: TrainConfig, step: int, micro: int
) -> list[Tensor | None] | None:
    """Return the stochastic-depth draws of this rank's micro-batches, on the CPU.

    They are cut out of the draws of the global batch, so they do not depend on the number of ranks.
    """
    if method.num_depth_branches == 0:
        return None

    draws = draw_depth_uniforms(
        config.seed,
        step,
        branches=method.num_depth_branches,
        crops=method.count_student_crops(config.views),
        batch_size=config.batch_size,
    )
    share = config.batch_size // distributed.world_size()
    mine = draws[..., distributed.rank() * share : (distributed.rank() + 1) * share]
    return list(torch.split(mine, micro, dim=-1))
