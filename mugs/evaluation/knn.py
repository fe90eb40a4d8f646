"""Weighted k-NN, every k and temperature from one pass (vote of the released code and DINO).

N bank rows, Q queries, D width, C classes, K the largest k.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mugs import distributed

BANK_ROWS = (
    16384  # of a block: large enough for a fast product, small enough to stay in a CPU's cache
)
QUERY_ROWS = 4096
Neighbors = tuple[Tensor, Tensor]
"""Cosines, descending, and bank indices, both (rows, k)."""


def find_nearest(bank: Tensor, queries: Tensor, k: int, *, memory_mb: int) -> Neighbors:
    """Cosines (Q, k), descending, and bank indices (Q, k), in fp32.

    Works in blocks of queries and bank rows, so that what it needs beside its inputs and result stays below
    `memory_mb`. A block of the bank takes every so-many-th row, whatever their order: neighbours are then spread over
    the blocks, and each has little to add to what the ones before it gave.
    """
    floats = max(
        memory_mb * 2**20 // (4 * 4), 4 * k
    )  # a quarter for cosines, the rest for finding the best of them
    bank_rows = min(len(bank), max(k, min(BANK_ROWS, floats)))
    query_rows = max(1, min(len(queries), QUERY_ROWS, floats // max(bank_rows, 4 * k)))
    similarity = torch.empty(query_rows * bank_rows, device=bank.device)
    best: list[Neighbors] = []
    blocks = -(-len(bank) // bank_rows)
    for first in range(blocks):
        rows = F.normalize(bank[first::blocks].float(), dim=-1)
        for part, start in enumerate(range(0, len(queries), query_rows)):
            query = F.normalize(queries[start : start + query_rows].float(), dim=-1)
            block = similarity[: len(query) * len(rows)].view(len(query), len(rows))
            above = best[part][0][:, -1:] if first and best[part][0].shape[1] == k else None
            cosine, index = grouped_topk(
                torch.mm(query, rows.T, out=block), min(k, len(rows)), above
            )
            if first == 0:
                best.append((cosine, index * blocks))
            else:
                best[part] = merge_neighbors(best[part], (cosine, index * blocks + first), k)
    return torch.cat([cosine for cosine, _ in best]), torch.cat([index for _, index in best])


def grouped_topk(values: Tensor, k: int, above: Tensor | None = None) -> Neighbors:
    """`topk` of the rows of (Q, n), at a fraction of its time when n is many times k.

    Columns are taken in groups; the k best lie in the k groups with the largest maxima. With `above` (Q, 1) only larger
    values are asked for: those lie in groups whose maximum is larger, and fewer than k may come back.
    """
    rows, columns = values.shape
    size = math.isqrt(columns // k)
    groups = columns // max(size, 1)
    if size < 4:
        return values.topk(k, dim=1)
    table = values[:, : size * groups].view(
        rows, size, groups
    )  # column = place in its group * groups + group
    maxima = table.amax(dim=1)
    chosen = k if above is None else min(k, int((maxima > above).sum(dim=1).max()))
    group = maxima.topk(chosen, dim=1, sorted=False).indices
    candidates = table.gather(2, group[:, None].expand(-1, size, -1)).flatten(1)
    column = (torch.arange(size, device=values.device)[:, None] * groups + group[:, None]).flatten(
        1
    )
    if rest := columns - size * groups:
        last = torch.arange(columns - rest, columns, device=values.device).expand(rows, -1)
        candidates, column = (
            torch.cat([candidates, values[:, -rest:]], dim=1),
            torch.cat([column, last], dim=1),
        )
    best, place = candidates.topk(min(k, candidates.shape[1]), dim=1)
    return best, column.gather(1, place)


def merge_neighbors(one: Neighbors, other: Neighbors, k: int) -> Neighbors:
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

    Bank and queries are whole on every rank; each rank takes its part of the queries, and all get the result. Raises
    ValueError when a k exceeds the bank, or features are not finite.
    """
    if not ks or max(ks) > len(bank) or min(ks) < 1:
        raise ValueError(
            f"ks {tuple(ks)} must lie between 1 and the {len(bank)} images of the bank"
        )
    for name, features in (("bank", bank), ("query", queries)):
        if not all(bool(torch.isfinite(part).all()) for part in torch.split(features, BANK_ROWS)):
            raise ValueError(f"{name} features are not finite")
    mine = slice(distributed.rank(), None, distributed.world_size())
    cosine, index = find_nearest(bank, queries[mine], max(ks), memory_mb=memory_mb)
    classes, labels, total = bank_labels[index], labels[mine], len(queries)
    sizes, rows = sorted(ks), max(1, memory_mb * 2**20 // (4 * 4 * (num_classes + max(ks))))
    result = {}
    for temperature in temperatures:
        hits = torch.zeros(len(sizes), 2, dtype=torch.int64, device=bank.device)
        for first in range(0, len(labels), rows):
            part = slice(first, first + rows)
            hits += count_hits(
                cosine[part], classes[part], labels[part], temperature, num_classes, sizes
            )
        counts = distributed.all_gather_rows(hits[None]).sum(dim=0).tolist()
        for k, (top1, top5) in zip(sizes, counts, strict=True):
            result[k, temperature] = {"top1": 100 * top1 / total, "top5": 100 * top5 / total}
    return result


def count_hits(
    cosine: Tensor,
    classes: Tensor,
    labels: Tensor,
    temperature: float,
    num_classes: int,
    ks: Sequence[int],
) -> Tensor:
    """Hits (len(ks), 2), top-1 and top-5; neighbours join in the order of k, so that a k costs only its new ones."""
    weight = torch.exp(cosine / temperature)
    scores = torch.zeros(len(cosine), num_classes, device=cosine.device)
    hits, used = [], 0
    for k in ks:
        scores.scatter_add_(1, classes[:, used:k], weight[:, used:k])
        used = k
        hit = scores.topk(min(5, num_classes), dim=1).indices == labels[:, None]
        hits.append(torch.stack([hit[:, 0].sum(), hit.any(dim=1).sum()]))
    return torch.stack(hits)
