"""Accuracy of a classifier on a whole split, over any number of ranks."""

from dataclasses import dataclass

import torch

from mugs import distributed
from mugs.data.loading.evaluation import iter_eval_batches
from mugs.data.sources.base import Source
from mugs.engine.precision import autocast
from mugs.finetune.classifier import ImageClassifier
from mugs.finetune.config import FinetuneConfig


@dataclass(frozen=True)
class EpochAccuracy:
    """Validation accuracy after an epoch, in percent."""

    epoch: int
    top1: float
    top5: float


@torch.no_grad()
def evaluate_accuracy(
    model: ImageClassifier,
    source: Source,
    config: FinetuneConfig,
    device: torch.device,
    batch_size: int,
) -> tuple[float, float]:
    """Return top-1 and top-5 in percent, and leave the model in training mode."""
    model.eval()
    model.backbone.set_depth_uniforms(None)  # no stochastic depth
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    batches = iter_eval_batches(
        source,
        resize=config.images.resize,
        crop=config.images.size,
        interpolation=config.images.eval_interpolation,
        batch_size=batch_size,
        # Every world-th image: none is repeated to make the ranks equal, so the result is exact.
        indices=range(distributed.rank(), len(source), distributed.world_size()),
        threads=max(config.workers, 1),
    )
    for images, labels, _ in batches:
        with autocast(config.precision, device):
            scores = model(images.to(device))
        hit = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels.to(device)[:, None]
        hits += torch.stack([hit[:, 0].sum(), hit.any(dim=1).sum()])
    model.train()
    top1, top5 = distributed.all_gather_rows(hits[None]).sum(dim=0).tolist()
    return 100 * top1 / len(source), 100 * top5 / len(source)
