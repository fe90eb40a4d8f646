"""Weighted k-NN, every k and temperature from one pass (vote of the released code and DINO).

N bank rows, Q queries, D width, C classes, K the largest k.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest(bank: Tensor, queries: Tensor, k: int, *, memory_mb: int) -> tuple[Tensor, Tensor]:
    """Cosines (Q, k), descending, and bank indices (Q, k).

    Works in blocks of queries and bank rows, so that the similarity block stays below `memory_mb`.
    """
    bank, queries = F.normalize(bank.float(), dim=-1), F.normalize(queries.float(), dim=-1)
    budget = max(memory_mb * 2**20 // (4 * 3), 4 * k)  # floats; a block, its top-k copy and the merge
    query_block = min(len(queries), max(1, budget // max(len(bank), 1), min(1024, budget // (4 * k))))
    bank_block = min(len(bank), max(k, budget // query_block))
    results = []
    for query in torch.split(queries, query_block):
        best: tuple[Tensor, Tensor] | None = None
        for first in range(0, len(bank), bank_block):
            block = query @ bank[first : first + bank_block].T
            cosine, index = block.topk(min(k, block.shape[1]), dim=1)
            best = (cosine, index + first) if best is None else merge(best, (cosine, index + first), k)
        assert best is not None
        results.append(best)
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results])


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of two sorted lists per query."""
    cosine, index = torch.cat([one[0], other[0]], dim=1), torch.cat([one[1], other[1]], dim=1)
    cosine, chosen = cosine.topk(min(k, cosine.shape[1]), dim=1)
    return cosine, index.gather(1, chosen)


def evaluate_knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float],
    memory_mb: int = 2048,
) -> dict[tuple[int, float], dict[str, float]]:
    """Accuracies in percent by (k, T): score of a class = sum of exp(cos / T) over its neighbours, arg max.

    Raises ValueError when a k exceeds the bank, or features are not finite.
    """
    if not ks or max(ks) > len(bank) or min(ks) < 1:
        raise ValueError(f"ks {tuple(ks)} must lie between 1 and the {len(bank)} images of the bank")
    for name, features in (("bank", bank), ("query", queries)):
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{name} features are not finite")
    cosine, index = nearest(bank, queries, max(ks), memory_mb=memory_mb)
    classes = bank_labels[index]
    result = {}
    rows = max(1, memory_mb * 2**20 // (4 * 4 * (num_classes + max(ks))))
    for temperature in temperatures:
        correct = {k: torch.zeros(2, device=bank.device) for k in ks}
        for part in range(0, len(queries), rows):
            block = slice(part, part + rows)
            _vote(cosine[block], classes[block], labels[block], temperature, num_classes, correct)
        for k, (top1, top5) in correct.items():
            result[k, temperature] = {
                "top1": 100 * top1.item() / len(queries),
                "top5": 100 * top5.item() / len(queries),
            }
    return result


def _vote(
    cosine: Tensor, classes: Tensor, labels: Tensor, temperature: float, num_classes: int, correct: dict[int, Tensor]
) -> None:
    """Add the neighbours in order of k, so that each k costs only its new neighbours."""
    weight = torch.exp(cosine / temperature)
    scores = torch.zeros(len(cosine), num_classes, device=cosine.device)
    used = 0
    for k in sorted(correct):
        scores.scatter_add_(1, classes[:, used:k], weight[:, used:k])
        used = k
        hit = scores.topk(min(5, num_classes), dim=1).indices == labels[:, None]
        correct[k] += torch.stack([hit[:, 0].sum(), hit.any(dim=1).sum()])
