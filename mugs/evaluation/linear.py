"""Linear probing as a task of the training loop: SGD or LARS, cosine per epoch, no warm-up.

The classifiers of a sweep are trained together on the same features. They are divided over the
ranks, and every rank sees the features and labels of the whole global batch, so the number of ranks
changes no number. Batches come from stored features, or from a frozen backbone on fresh views.
"""

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mugs import distributed
from mugs.checkpoint.save_load import StateDicts
from mugs.data.loading.drawing import Augmentation
from mugs.data.loading.evaluation import iter_probe_batches
from mugs.data.loading.order import SampleOrder
from mugs.data.sources.base import Source
from mugs.engine.progress import Progress
from mugs.evaluation.classifiers import LinearClassifiers
from mugs.evaluation.config import LinearProbe, Setting
from pipeline.files import write_atomic

BatchFactory = Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]
"""(start, stop) -> features and labels of this rank for the global steps start ... stop - 1.

All ranks get equally many rows in a step.
"""


@dataclass(frozen=True)
class EpochResult:
    """Training loss and validation accuracies in percent after an epoch, per classifier."""

    loss: list[float]
    top1: list[float]
    top5: list[float]


@dataclass(frozen=True)
class BestClassifier:
    """The classifier and epoch with the best validation accuracy."""

    setting: Setting
    epoch: int
    top1: float
    top5: float


class DivergedError(ValueError):
    """No classifier has a finite loss any more."""


class LinearProbeTraining:
    """Classifiers on features: the task that the loop of `mugs.engine.loop` trains.

    validation: features (N, D) and labels (N,) of the whole split, the same on all ranks.
    """

    def __init__(
        self,
        probe: LinearProbe,
        batches: BatchFactory,
        steps_per_epoch: int,
        validation: tuple[Tensor, Tensor],
        num_classes: int,
        run_dir: Path,
    ) -> None:
        self.probe = probe
        self.batches = batches
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = probe.epochs * steps_per_epoch
        self.validation = validation
        self.run_dir = run_dir
        self.device = validation[0].device
        self.own = settings_of_rank(probe.settings, distributed.rank(), distributed.world_size())
        self.classifiers = LinearClassifiers(
            [probe.settings[i] for i in self.own],
            validation[0].shape[1],
            num_classes,
            seed=probe.seed,
            momentum=probe.momentum,
            device=self.device,
        )
        # Sums over the steps of the epoch so far. They stay on the device: reading them in each
        # step would make the CPU wait for the GPU.
        self.losses = torch.zeros(len(self.own), device=self.device)
        self.history: list[EpochResult] = []

    def steps(self, start: int) -> Iterator[None]:
        """Make one optimizer step of all classifiers per item."""
        rates = self._rates(start // self.steps_per_epoch)
        with closing(
            Progress(
                "linear",
                self.total_steps,
                path=self.run_dir / "progress.json",
                start=start,
                quiet=not distributed.is_main(),
                in_background=True,
            )
        ) as progress:
            for step, (features, labels) in enumerate(self.batches(start, self.total_steps), start):
                epoch, within = divmod(step, self.steps_per_epoch)
                if within == 0:
                    rates = self._rates(epoch)
                inputs = distributed.all_gather_rows(features)
                targets = distributed.all_gather_rows(labels)
                self.losses += self.classifiers.update(inputs, targets, rates)
                if within == self.steps_per_epoch - 1:
                    self._finish_epoch()
                detail = f"top-1 {max(self.history[-1].top1):.2f}%" if self.history else ""
                progress.update(step + 1, items=len(targets), detail=detail)
                yield

    def _rates(self, epoch: int) -> Tensor:
        rates = self.probe.rates(epoch)
        return torch.tensor([rates[i] for i in self.own], device=self.device)

    def _finish_epoch(self) -> None:
        """Validate, and note the epoch on all ranks."""
        loss = (self.losses / self.steps_per_epoch)[:, None]
        own = torch.cat([loss, self.classifiers.accuracy(*self.validation)], dim=1)
        self.history.append(EpochResult(*self._gather(own).T.tolist()))
        self.losses.zero_()

    def _gather(self, own: Tensor) -> Tensor:
        """Turn the rows of this rank's classifiers into those of all, in the order of settings."""
        world = distributed.world_size()
        order = [
            i for rank in range(world) for i in settings_of_rank(self.probe.settings, rank, world)
        ]
        by_rank = distributed.all_gather_uneven_rows(own)
        result = torch.empty_like(by_rank)
        result[torch.tensor(order, device=own.device)] = by_rank
        return result

    def check_before_save(self) -> None:
        """Raise DivergedError unless some classifier has a finite loss.

        One that diverged is no error: sweeps contain rates that are too high. Its loss has to be
        finite in the epoch so far and in the last one, because the sums restart with each epoch.
        """
        finite = torch.isfinite(self._gather(self.losses)).tolist()
        last = self.history[-1].loss if self.history else [0.0] * len(finite)
        if not any(f and math.isfinite(loss) for f, loss in zip(finite, last, strict=True)):
            raise DivergedError(
                f"linear probe: no finite loss in epoch {len(self.history)}; lower base_lr "
                f"({min(setting.base_lr for setting in self.probe.settings):g} is the lowest)"
            )

    def state_dicts(self) -> StateDicts:
        """Return the classifiers of all ranks, so that a resume may use other ranks."""
        return {
            "classifiers": {
                name: self._gather(value).cpu() for name, value in self.classifiers.tensors.items()
            },
            "epoch": {"losses": self._gather(self.losses).cpu()},
        }

    def metadata(self) -> dict[str, Any]:
        """Return the results of the finished epochs."""
        # Losses as text: a diverged one is inf or nan, which is not JSON.
        return {
            "history": [
                {"loss": list(map(str, e.loss)), "top1": e.top1, "top5": e.top5}
                for e in self.history
            ]
        }

    def load_state(self, parts: StateDicts, notes: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.classifiers.load(
            {name: value[self.own] for name, value in parts["classifiers"].items()}
        )
        self.losses.copy_(parts["epoch"]["losses"][self.own])
        self.history = [
            EpochResult(list(map(float, e["loss"])), e["top1"], e["top5"]) for e in notes["history"]
        ]

    def best(self, epochs: Sequence[int]) -> BestClassifier:
        """Return the best classifier of the given epochs by top-1, the first of equals.

        Selection is on the validation images, as in the release, DINO and iBOT (E20).
        """
        pairs = ((epoch, i) for epoch in epochs for i in range(len(self.probe.settings)))
        epoch, i = max(pairs, key=lambda pair: self.history[pair[0]].top1[pair[1]])
        result = self.history[epoch]
        return BestClassifier(self.probe.settings[i], epoch, result.top1[i], result.top5[i])

    def write_history(self, path: Path) -> None:
        """Write a CSV file with one line per epoch and classifier."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["epoch", "base_lr", "weight_decay", "optimizer", "loss", "top1", "top5"])
        for epoch, result in enumerate(self.history):
            rows = zip(self.probe.settings, result.loss, result.top1, result.top5, strict=True)
            for setting, *values in rows:
                writer.writerow(
                    [
                        epoch,
                        setting.base_lr,
                        setting.weight_decay,
                        setting.optimizer,
                        *(f"{value:.6g}" for value in values),
                    ]
                )
        write_atomic(path, text.getvalue())


def settings_of_rank(settings: Sequence[Setting], rank: int, world: int) -> list[int]:
    """Return which settings a rank trains: every world-th of them, those of SGD first.

    Dealt out one by one, so that every rank gets about as many of each optimizer: a step of LARS
    costs more than one of SGD.
    """
    return sorted(range(len(settings)), key=lambda i: settings[i].optimizer == "lars")[rank::world]


def build_order(num_images: int, *, seed: int, batch_size: int) -> SampleOrder:
    """Return the sample order of this rank.

    The last batch of an epoch is short: the release does not drop incomplete batches here.
    """
    return SampleOrder(
        num_images,
        seed=seed,
        world=distributed.world_size(),
        rank=distributed.rank(),
        batch_size=batch_size,
        short_last=True,
    )


def build_feature_batches(features: Tensor, labels: Tensor, order: SampleOrder) -> BatchFactory:
    """Return batches of features (N, D) that are the same in every epoch."""

    def batches(start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, stop):
            ids = torch.from_numpy(order.indices(step)).to(features.device)
            yield features[ids], labels[ids]

    return batches


def build_image_batches(
    model: Callable[[Tensor], Tensor],
    source: Source,
    order: SampleOrder,
    *,
    seed: int,
    augmentation: Augmentation,
    crop: int,
    threads: int,
    device: torch.device,
) -> BatchFactory:
    """Return batches of features that `model` computes from a fresh view of each image."""

    def batches(start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in iter_probe_batches(
            source,
            order,
            start,
            stop,
            seed=seed,
            augmentation=augmentation,
            crop=crop,
            device=device,
            threads=threads,
        ):
            # Not around the `yield`: a generator would leave the caller in no-grad mode.
            with torch.no_grad():
                features = model(images)
            yield features, labels

    return batches
