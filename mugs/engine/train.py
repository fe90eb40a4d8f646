"""The pretraining loop; it knows no method.

    for step:  batch -> views on the device -> Trainer.step -> metrics, progress, checkpoint
State to resume is the step, networks, optimizer and the method's extra state: all randomness is a function of
(seed, step) or (seed, epoch, sample).
"""

import json
import logging
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mugs.backbones.stochastic_depth import depth_uniforms
from mugs.data.device import DeviceStage
from mugs.data.loader import Batch, LoaderName, RendererName, make_loader
from mugs.data.order import Order
from mugs.data.recipe import ViewRecipe
from mugs.data.source import Source
from mugs.engine import distributed
from mugs.engine.agreement import require_equal
from mugs.engine.calibration import EpochMeans
from mugs.engine.checkpoint import CheckpointError, Parts, load_latest, save_checkpoint
from mugs.engine.failures import NonFiniteError, write_failure
from mugs.engine.metering import Meter, Trace
from mugs.engine.optim import build_adamw
from mugs.engine.progress import Progress
from mugs.engine.schedules import Schedule
from mugs.engine.step import StepConfig, StepResult, Trainer, split
from mugs.methods.base import Method

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run around the method. `batch_size` is global; the last eight fields cannot change a number.

    calibration: epoch -> name of a loss (or "total") -> its mean in a known run, to compare with.
    """

    epochs: int
    batch_size: int
    base_lr: float
    min_lr: float = 1e-6
    warmup_epochs: int = 10
    weight_decay: tuple[float, float] = (0.04, 0.2)
    teacher_momentum: float = 0.996
    patch_lr_scale: float = 0.2
    steps_per_epoch: int | None = None
    seed: int = 0
    step: StepConfig = field(default_factory=StepConfig)
    views: ViewRecipe = field(default_factory=ViewRecipe)
    max_images_per_step: int | None = None
    loader: LoaderName = "auto"
    renderer: RendererName = "fast"
    threads: int = 2
    checkpoint_steps: int = 500
    log_steps: int = 10
    profile_steps: int = 0
    calibration: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    @property
    def peak_lr(self) -> float:
        """base_lr * batch_size / 256."""
        return self.base_lr * self.batch_size / 256


def pretrain(method: Any, source: Source, config: TrainConfig, run_dir: Path, device: torch.device) -> None:
    """Train to the end, from the newest good checkpoint in `run_dir/checkpoints` when there is one.

    Raises ValueError when the batch does not divide over the ranks, NonFiniteError, CheckpointError.
    """
    order, micro = plan_batches(len(source), config)
    if method.needs_whole_batch and micro * distributed.world_size() < config.batch_size:
        raise ValueError(
            f"max_images_per_step {config.max_images_per_step}: batch normalisation wants each rank's "
            f"{config.batch_size // distributed.world_size()} images at once; unset it or use more ranks"
        )
    schedule = build_schedule(config, order.steps_per_epoch)
    method.to(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as released
    optimizer = build_adamw(method.student, config.patch_lr_scale)
    start, meta = resume(method, optimizer, run_dir / "checkpoints")
    require_equal(method.extra_state)
    student: nn.Module = method.student
    if distributed.world_size() > 1:
        student = DistributedDataParallel(student, gradient_as_bucket_view=True, broadcast_buffers=False)
    trainer = Trainer(method, optimizer, schedule, config.step, student)
    flops = method.flops(config.views, config.batch_size // distributed.world_size())
    meter = Meter(device, config.step.precision, flops)
    log = StepLog(run_dir, schedule, config, start, meta, meter)
    loader = make_loader(
        source,
        config.views,
        order,
        seed=config.seed,
        loader=config.loader,
        renderer=config.renderer,
        threads=config.threads,
    )
    stage = DeviceStage(device, config.views, config.seed)
    with closing(loader), closing(log), closing(Trace(run_dir / "trace", config.profile_steps)) as trace:
        batches = iter(loader.iterate(start, schedule.total_steps))
        for step in range(start, schedule.total_steps):
            waited = time.monotonic()
            batch = next(batches)
            waited = time.monotonic() - waited
            views = list(split(stage(batch), micro))
            masks = depth_masks(method, config, step, micro, device)
            result = trainer.step(views, step, masks)
            log.record(step, result, batch, waited)
            trace.step()
            if (step + 1) % config.checkpoint_steps == 0 or step + 1 == schedule.total_steps:
                log.check_finite()
                require_equal(method.extra_state)
                save(method, optimizer, run_dir / "checkpoints", step + 1, log.state())


def plan_batches(num_images: int, config: TrainConfig) -> tuple[Order, int]:
    """The order of samples, and the images of this rank in one micro-batch."""
    world = distributed.world_size()
    if config.batch_size % world:
        raise ValueError(f"batch_size {config.batch_size} does not divide over {world} ranks")
    if config.batch_size > num_images and config.steps_per_epoch is None:
        raise ValueError(f"batch_size {config.batch_size} exceeds the data set's {num_images} images")
    per_rank = config.batch_size // world
    micro = min(per_rank, config.max_images_per_step or per_rank)
    if per_rank % micro:
        raise ValueError(f"{per_rank} images per rank do not divide into micro-batches of {micro}")
    order = Order(
        num_images,
        seed=config.seed,
        world=world,
        rank=distributed.rank(),
        batch_size=config.batch_size,
        steps_per_epoch=config.steps_per_epoch,
    )
    return order, micro


def build_schedule(config: TrainConfig, steps_per_epoch: int) -> Schedule:
    """Schedules of the run."""
    return Schedule(
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        peak_lr=config.peak_lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay[0],
        weight_decay_end=config.weight_decay[1],
        momentum=config.teacher_momentum,
    )


def depth_masks(
    method: Method, config: TrainConfig, step: int, micro: int, device: torch.device
) -> list[Tensor | None] | None:
    """Stochastic-depth draws of this rank's micro-batches, cut out of those of the global batch."""
    if method.depth_branches == 0:
        return None
    crops = 2 + config.views.num_small
    draws = depth_uniforms(config.seed, step, branches=method.depth_branches, crops=crops, batch_size=config.batch_size)
    share = config.batch_size // distributed.world_size()
    mine = draws[..., distributed.rank() * share : (distributed.rank() + 1) * share].to(device)
    return list(torch.split(mine, micro, dim=-1))


def state_parts(method: Method, optimizer: torch.optim.Optimizer) -> Parts:
    """Everything a resumed run needs, by file."""
    state = optimizer.state_dict()["state"]
    moments = {f"{i}.{k}": v for i, entry in state.items() for k, v in entry.items()}
    return {
        "student": dict(method.student.state_dict()),
        "teacher": dict(method.teacher.state_dict()),
        "optimizer": moments,
        "extra_state": dict(method.extra_state.state_dict()),
    }


def save(method: Method, optimizer: torch.optim.Optimizer, folder: Path, step: int, meta: dict[str, Any]) -> None:
    """Checkpoint on rank 0; the others wait."""
    if distributed.is_main():
        save_checkpoint(folder, step, state_parts(method, optimizer), meta)
    distributed.barrier()


def resume(method: Method, optimizer: torch.optim.Optimizer, folder: Path) -> tuple[int, dict[str, Any]]:
    """Load the newest good checkpoint into method and optimizer; returns the step to go on with, and its notes."""
    found = load_latest(folder)
    if found is None:
        return 0, {}
    step, parts, meta = found
    try:
        method.student.load_state_dict(parts["student"])
        method.teacher.load_state_dict(parts["teacher"])
        method.extra_state.load_state_dict(parts["extra_state"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: checkpoint of step {step} does not fit this run: {error}") from error
    logger.info("resumed at step %d from %s", step, folder)
    return step, meta


class StepLog:
    """metrics.jsonl and progress of rank 0; holds device tensors and reads them only when a line is due."""

    def __init__(
        self, run_dir: Path, schedule: Schedule, config: TrainConfig, start: int, meta: Mapping[str, Any], meter: Meter
    ) -> None:
        self.schedule, self.config, self.main = schedule, config, distributed.is_main()
        run_dir.mkdir(parents=True, exist_ok=True)
        self.metrics = (run_dir / "metrics.jsonl").open("a", encoding="utf-8") if self.main else None
        path = run_dir / "progress.json" if self.main else None
        self.progress = Progress("pretrain", schedule.total_steps, path=path, start=start, quiet=not self.main)
        self.run_dir, self.meter = run_dir, meter
        self.pending: list[StepResult] = []
        self.ids: list[Tensor] = []
        self.waited, self.since = 0.0, time.monotonic()
        self.last = start
        self.means = EpochMeans(config.calibration, schedule.steps_per_epoch, meta.get("epoch_means", {}))

    def record(self, step: int, result: StepResult, batch: Batch, waited: float) -> None:
        """Note one step; every `log_steps` write a line of means."""
        self.pending.append(result)
        self.waited += waited
        self.ids.append(batch.ids)
        self.last = step
        detail = ""
        if (step + 1) % self.config.log_steps == 0 or step + 1 == self.schedule.total_steps:
            detail = self._write(step)
        self.means.add(step, result)
        self._calibrate(step)
        self.progress.update(step + 1, items=self.config.batch_size, detail=detail)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the log."""
        return {"epoch_means": self.means.state()}

    def _calibrate(self, step: int) -> None:
        comparison = self.means.compare(step)
        if comparison is None:
            return
        self.check_finite()
        if self.metrics is not None:
            logger.info("%s", comparison.line())
            line = {"step": step, "epoch": comparison.epoch, "calibration": comparison.record()}
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()

    def _write(self, step: int) -> str:
        steps, seconds = len(self.pending), time.monotonic() - self.since
        line = {
            "step": step,
            "epoch": step // self.schedule.steps_per_epoch,
            **self._mean_losses(),
            "lr": self.schedule.lr(step),
            "weight_decay": self.schedule.wd(step),
            "teacher_momentum": self.schedule.teacher_momentum(step),
            "images_per_second": self.config.batch_size * steps / seconds,
            "step_ms": 1000 * seconds / steps,
            "data_wait_share": self.waited / seconds,
            **self.meter.fields(steps, seconds),
        }
        self.check_finite()
        if self.metrics is not None:
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()
        self.pending, self.ids = [], []
        self.waited, self.since = 0.0, time.monotonic()
        text = f"loss {line['loss']:.4f}, data wait {100 * line['data_wait_share']:.0f}%"
        return f"{text}, {line['tflops']:.2f} TFLOP/s, peak {line['peak_memory_mb']:.0f} MB"

    def _mean_losses(self) -> dict[str, float]:
        """Means over the pending steps and all ranks."""
        names = ["loss", *(f"loss_{name}" for name in self.pending[0].losses)]
        values = torch.stack([torch.stack([r.total, *r.losses.values()]) for r in self.pending]).mean(dim=0)
        return dict(zip(names, distributed.all_reduce_mean(values).tolist(), strict=True))

    def check_finite(self) -> None:
        """Raise NonFiniteError, on all ranks, when a step since the last check was not finite."""
        if not self.pending:
            return
        finite = torch.stack([r.finite for r in self.pending]).tolist()  # the one wait for the device
        if not all(finite):
            bad = finite.index(False)
            step = self.last - len(finite) + 1 + bad
            epoch, ids = step // self.schedule.steps_per_epoch, self.ids[bad].tolist()
            path = write_failure(self.run_dir, step, epoch, self.config.seed, ids, self.pending[bad])
            raise NonFiniteError(
                f"loss or gradient not finite at step {step}; it changed no weight and no queue, the last "
                f"checkpoint is good, start again to go on from there. Samples and losses of this rank: {path}"
            )

    def close(self) -> None:
        """Close the files."""
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()
