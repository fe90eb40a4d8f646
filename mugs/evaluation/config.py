"""Settings of the evaluations of frozen features."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt

from pipeline.settings import Internal, Settings

Feature = Literal["cls", "patch_mean", "last4_cls", "cls_patchmean"]


@dataclass(frozen=True)
class Setting:
    """How one classifier is trained; the rate is for 256 images."""

    base_lr: float
    weight_decay: float = 0.0
    optimizer: Literal["sgd", "lars"] = "sgd"

    def __str__(self) -> str:
        """Return the setting as tables and logs name it."""
        return f"lr {self.base_lr:g}, weight decay {self.weight_decay:g}, {self.optimizer.upper()}"


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Settings):
    """A training of linear classifiers, one for each of `settings`. `batch_size` is global."""

    settings: Internal[tuple[Setting, ...]] = ()
    final_lr: NonNegativeFloat = 1e-5
    batch_size: PositiveInt = 1024
    epochs: PositiveInt = 100
    momentum: Internal[float] = 0.9
    seed: int = 0

    def rates(self, epoch: int) -> list[float]:
        """Return the learning rate of each classifier in an epoch.

        It follows a cosine from base_lr * batch_size / 256 to final_lr.
        """
        fall = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        peaks = [s.base_lr * self.batch_size / 256 for s in self.settings]
        return [self.final_lr + fall * (peak - self.final_lr) for peak in peaks]
