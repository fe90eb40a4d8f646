"""Linear probing: one linear layer on frozen features, SGD, cosine per epoch, no warm-up.

The classifier starts from N(0, 0.01) with bias 0; the learning rate is base_lr * batch_size / 256.
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mugs.backbones.vit import ViT
from mugs.data.evaluation import Augmentation, eval_batches, probe_batches
from mugs.data.order import Order
from mugs.data.source import Source
from mugs.engine import distributed
from mugs.engine.checkpoint import load_latest, save_checkpoint
from mugs.engine.progress import Progress
from mugs.evaluation.features import Feature, backbone_feature, extract

logger = logging.getLogger(__name__)
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Settings of a probe; `batch_size` is global."""

    feature: Feature = "last4_cls"
    base_lr: float = 0.015
    final_lr: float = 1e-5
    batch_size: int = 1024
    epochs: int = 100
    momentum: float = 0.9
    seed: int = 0

    def lr(self, epoch: int) -> float:
        """Cosine from base_lr * batch_size / 256 to final_lr, one value per epoch."""
        peak = self.base_lr * self.batch_size / 256
        return self.final_lr + 0.5 * (peak - self.final_lr) * (1 + math.cos(math.pi * epoch / self.epochs))


@dataclass(frozen=True)
class EpochResult:
    """Validation accuracy after an epoch, percent."""

    epoch: int
    loss: float
    top1: float
    top5: float


def new_classifier(width: int, num_classes: int, seed: int) -> nn.Linear:
    """Linear layer with weights N(0, 0.01) drawn from the seed, bias 0."""
    classifier = nn.Linear(width, num_classes)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        classifier.weight.copy_(torch.randn(num_classes, width, generator=generator) * 0.01)
        classifier.bias.zero_()
    return classifier


def train_probe(
    probe: LinearProbe,
    classifier: nn.Linear,
    train: Callable[[int], Batches],
    validation: tuple[Tensor, Tensor],
    run_dir: Path,
) -> list[EpochResult]:
    """Train on the feature batches `train(epoch)` yields on this rank; resumes at the last finished epoch.

    validation: features and labels of the whole split, the same on all ranks.
    """
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.0, momentum=probe.momentum)
    history = _resume(classifier, optimizer, run_dir / "checkpoints")
    model: nn.Module = DistributedDataParallel(classifier) if distributed.world_size() > 1 else classifier
    path = run_dir / "progress.json" if distributed.is_main() else None
    start = len(history)
    progress = Progress("linear", probe.epochs, unit="epochs", path=path, start=start, quiet=not distributed.is_main())
    for epoch in range(start, probe.epochs):
        optimizer.param_groups[0]["lr"] = probe.lr(epoch)
        losses, seen = [], 0
        for features, labels in train(epoch):
            loss = F.cross_entropy(model(features), labels)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.detach())
            seen += len(labels)
        mean = float(distributed.all_reduce_mean(torch.stack(losses).mean()))
        if not math.isfinite(mean):
            raise ValueError(f"linear probe: loss not finite in epoch {epoch}; lower base_lr ({probe.base_lr})")
        history.append(EpochResult(epoch, mean, *accuracy(classifier, *validation)))
        _save(classifier, optimizer, run_dir / "checkpoints", history)
        progress.update(epoch + 1, items=seen * distributed.world_size(), detail=f"top-1 {history[-1].top1:.2f}%")
    progress.close()
    return history


@torch.no_grad()
def accuracy(classifier: nn.Linear, features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 in percent."""
    scores = classifier(features)
    hit = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return 100 * hit[:, 0].float().mean().item(), 100 * hit.any(dim=1).float().mean().item()


def _save(classifier: nn.Linear, optimizer: torch.optim.SGD, folder: Path, history: list[EpochResult]) -> None:
    if distributed.is_main():
        momentum = {n: optimizer.state[p]["momentum_buffer"] for n, p in classifier.named_parameters()}
        parts = {"classifier": dict(classifier.state_dict()), "momentum": momentum}
        save_checkpoint(folder, len(history), parts, {"history": [asdict(e) for e in history]})
    distributed.barrier()


def _resume(classifier: nn.Linear, optimizer: torch.optim.SGD, folder: Path) -> list[EpochResult]:
    found = load_latest(folder)
    if found is None:
        return []
    step, parts, meta = found
    classifier.load_state_dict(parts["classifier"])
    for name, parameter in classifier.named_parameters():
        optimizer.state[parameter]["momentum_buffer"] = parts["momentum"][name].to(parameter.device)
    logger.info("resumed the probe at epoch %d", step)
    return [EpochResult(**entry) for entry in meta["history"]]


def train_on_images(
    probe: LinearProbe,
    vit: ViT,
    train: Source,
    val: Source,
    *,
    num_classes: int,
    augmentation: Augmentation | Literal["none"],
    resize: int,
    crop: int,
    threads: int,
    run_dir: Path,
    device: torch.device,
) -> list[EpochResult]:
    """Probe a frozen backbone: fresh views every epoch, validation features extracted once.

    With augmentation "none" the features of the training images are extracted once as well. The last batch of an epoch
    is short, as released.
    """
    world, rank = distributed.world_size(), distributed.rank()
    model = backbone_feature(vit, probe.feature)

    def centre_features(source: Source) -> tuple[Tensor, Tensor]:
        mine = list(range(rank, len(source), world))
        views = eval_batches(source, resize=resize, crop=crop, batch_size=256, indices=mine, threads=threads)
        return extract(model, views, device=device)[:2]

    validation = centre_features(val)
    fixed = centre_features(train) if augmentation == "none" else None
    order = Order(len(train), seed=probe.seed, world=world, rank=rank, batch_size=probe.batch_size, short_last=True)

    def feature_batches(epoch: int) -> Batches:
        if augmentation == "none":
            assert fixed is not None
            for within in range(order.steps_per_epoch):
                ids = torch.from_numpy(order.indices(epoch * order.steps_per_epoch + within)).to(device)
                yield fixed[0][ids], fixed[1][ids]
            return
        views = probe_batches(
            train,
            order,
            epoch=epoch,
            seed=probe.seed,
            augmentation=augmentation,
            crop=crop,
            device=device,
            threads=threads,
        )
        for images, target in views:
            with torch.no_grad():
                batch = model(images)
            yield batch, target

    classifier = new_classifier(validation[0].shape[1], num_classes, probe.seed).to(device)
    return train_probe(probe, classifier, feature_batches, validation, run_dir)
