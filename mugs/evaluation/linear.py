"""Linear probing as a task of the training loop: SGD or LARS, cosine per epoch, no warm-up.

The classifiers of a sweep are trained together on the same features and divided over the ranks; features and labels
of the global batch go to all of them, so the number of ranks changes no number.
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
from mugs.engine.progress import Progress
from mugs.evaluation.classifiers import LinearClassifiers, Setting
from pipeline.files import write_atomic

BatchFactory = Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]
"""(start, stop) -> this rank's features and labels of the global steps from start to stop; equal parts on all ranks."""


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Settings of a probe; `batch_size` is global."""

    settings: tuple[Setting, ...]
    final_lr: float = 1e-5
    batch_size: int = 1024
    epochs: int = 100
    momentum: float = 0.9
    seed: int = 0

    def rates(self, epoch: int) -> list[float]:
        """Cosine from base_lr * batch_size / 256 to final_lr, one value per epoch and classifier."""
        fall = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        peaks = [s.base_lr * self.batch_size / 256 for s in self.settings]
        return [self.final_lr + fall * (peak - self.final_lr) for peak in peaks]


@dataclass(frozen=True)
class EpochResult:
    """Training loss and validation accuracies in percent after an epoch, a value per classifier."""

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

    validation: features and labels of the whole split, the same on all ranks.
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
        self.probe, self.batches, self.steps_per_epoch, self.run_dir = (
            probe,
            batches,
            steps_per_epoch,
            run_dir,
        )
        self.validation, self.total_steps = validation, probe.epochs * steps_per_epoch
        self.mine = settings_of_rank(probe.settings, distributed.rank(), distributed.world_size())
        self.device, width = validation[0].device, validation[0].shape[1]
        chosen = [probe.settings[i] for i in self.mine]
        self.classifiers = LinearClassifiers(
            chosen, width, num_classes, seed=probe.seed, momentum=probe.momentum, device=self.device
        )
        self.losses = torch.zeros(
            len(self.mine), device=self.device
        )  # sums over the steps of the epoch so far
        self.history: list[EpochResult] = []

    def steps(self, start: int) -> Iterator[None]:
        """One optimizer step of all classifiers per item."""
        rates, rated = torch.empty(0), -1
        with closing(self._progress(start)) as progress:
            for step, (features, labels) in enumerate(self.batches(start, self.total_steps), start):
                epoch, within = divmod(step, self.steps_per_epoch)
                if epoch != rated:
                    rates, rated = self._rates(epoch), epoch
                inputs, targets = (
                    distributed.all_gather_rows(features),
                    distributed.all_gather_rows(labels),
                )
                self.losses += self.classifiers.update(inputs, targets, rates)
                if within == self.steps_per_epoch - 1:
                    self._finish_epoch()
                detail = f"top-1 {max(self.history[-1].top1):.2f}%" if self.history else ""
                progress.update(step + 1, items=len(targets), detail=detail)
                yield

    def _progress(self, start: int) -> Progress:
        path, quiet = self.run_dir / "progress.json", not distributed.is_main()
        return Progress("linear", self.total_steps, path=path, start=start, quiet=quiet)

    def _rates(self, epoch: int) -> Tensor:
        every = self.probe.rates(epoch)
        return torch.tensor([every[i] for i in self.mine], device=self.device)

    def _finish_epoch(self) -> None:
        """Validate, and note the epoch on all ranks."""
        means = self.losses / self.steps_per_epoch
        mine = torch.cat([means[:, None], self.classifiers.accuracy(*self.validation)], dim=1)
        loss, top1, top5 = self._of_all(mine).T.tolist()
        self.history.append(EpochResult(loss, top1, top5))
        self.losses.zero_()

    def _of_all(self, mine: Tensor) -> Tensor:
        """Entries of this rank's classifiers -> entries of all, in the order of the settings."""
        world = distributed.world_size()
        order = [
            i for rank in range(world) for i in settings_of_rank(self.probe.settings, rank, world)
        ]
        grouped = distributed.all_gather_uneven_rows(mine)
        result = torch.empty_like(grouped)
        result[torch.tensor(order, device=mine.device)] = grouped
        return result

    def check_before_save(self) -> None:
        """Some classifier still has a finite loss, in the epoch so far and in the last one."""
        finite = torch.isfinite(self._of_all(self.losses)).tolist()
        if self.history:
            finite = [
                f and math.isfinite(loss)
                for f, loss in zip(finite, self.history[-1].loss, strict=True)
            ]
        if not any(finite):
            rates = sorted({s.base_lr for s in self.probe.settings})
            raise DivergedError(
                f"linear probe: no finite loss in epoch {len(self.history)}; lower base_lr ({rates[0]:g} is the lowest)"
            )

    def state_dicts(self) -> StateDicts:
        """Weights, biases, momenta and loss sums of the classifiers of all ranks."""
        state = {
            name: self._of_all(value).cpu() for name, value in self.classifiers.tensors.items()
        }
        return {"classifiers": state, "epoch": {"losses": self._of_all(self.losses).cpu()}}

    def metadata(self) -> dict[str, Any]:
        """Results of the finished epochs."""
        return {
            "history": [
                {"loss": list(map(str, e.loss)), "top1": e.top1, "top5": e.top5}
                for e in self.history
            ]
        }

    def load_state(self, parts: StateDicts, notes: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.classifiers.load(
            {name: value[self.mine] for name, value in parts["classifiers"].items()}
        )
        self.losses.copy_(parts["epoch"]["losses"][self.mine])
        self.history = [
            EpochResult(list(map(float, e["loss"])), e["top1"], e["top5"]) for e in notes["history"]
        ]

    def best(self, epochs: Sequence[int]) -> BestClassifier:
        """The best classifier of the given epochs by top-1 on the validation images, the first of equals."""
        pairs = ((epoch, i) for epoch in epochs for i in range(len(self.probe.settings)))
        epoch, i = max(pairs, key=lambda pair: self.history[pair[0]].top1[pair[1]])
        result = self.history[epoch]
        return BestClassifier(self.probe.settings[i], epoch, result.top1[i], result.top5[i])

    def write_history(self, path: Path) -> None:
        """A CSV line per epoch and classifier."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["epoch", "base_lr", "weight_decay", "optimizer", "loss", "top1", "top5"])
        for epoch, result in enumerate(self.history):
            for s, *values in zip(
                self.probe.settings, result.loss, result.top1, result.top5, strict=True
            ):
                writer.writerow(
                    [epoch, s.base_lr, s.weight_decay, s.optimizer, *(f"{v:.6g}" for v in values)]
                )
        write_atomic(path, text.getvalue())


def settings_of_rank(settings: Sequence[Setting], rank: int, world: int) -> list[int]:
    """Which of the settings a rank trains: every world-th of them, those of SGD first."""
    order = sorted(range(len(settings)), key=lambda i: settings[i].optimizer == "lars")
    return order[rank::world]
