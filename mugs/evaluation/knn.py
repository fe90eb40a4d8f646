"""Weighted k-NN for every k and temperature in one pass (the vote of DINO and of the release).

Shapes: N bank rows, Q queries, D width, C classes, K the largest k.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mugs import distributed

# Rows of a block of the bank and of the queries: large enough for a fast matrix product, small
# enough that a block of the bank stays in a CPU's cache.
BANK_ROWS = 16384
QUERY_ROWS = 4096
MB = 2**20
Neighbors = tuple[Tensor, Tensor]
"""Cosines in descending order and bank indices, both (rows, k)."""


def find_nearest(bank: Tensor, queries: Tensor, k: int, *, memory_mb: int) -> Neighbors:
    """Return cosines (Q, k) in descending order and bank indices (Q, k), computed in fp32.

    Works in blocks of queries (Q, D) and bank rows (N, D), so that everything beside inputs and
    result stays below `memory_mb`.
    """
    # A quarter of the memory for cosines (4 bytes each), the rest for finding the best of them.
    num_floats = max(memory_mb * MB // (4 * 4), 4 * k)
    bank_rows = min(len(bank), max(k, min(BANK_ROWS, num_floats)))
    query_rows = max(1, min(len(queries), QUERY_ROWS, num_floats // max(bank_rows, 4 * k)))
    similarity = torch.empty(query_rows * bank_rows, device=bank.device)

    # Block `first` of the bank takes the rows first, first + num_blocks, ... The neighbors of a
    # query are then spread over all blocks even when the bank is sorted by class, so a block has
    # little to add to what the blocks before it found, and `above` lets `grouped_topk` skip most.
    num_blocks = -(-len(bank) // bank_rows)
    best: list[Neighbors] = []
    for first in range(num_blocks):
        rows = F.normalize(bank[first::num_blocks].float(), dim=-1)
        for part, start in enumerate(range(0, len(queries), query_rows)):
            query = F.normalize(queries[start : start + query_rows].float(), dim=-1)
            cosines = similarity[: len(query) * len(rows)].view(len(query), len(rows))
            torch.mm(query, rows.T, out=cosines)

            above = best[part][0][:, -1:] if first and best[part][0].shape[1] == k else None
            cosine, index = grouped_topk(cosines, min(k, len(rows)), above)
            found = (cosine, index * num_blocks + first)
            if first == 0:
                best.append(found)
            else:
                best[part] = merge_neighbors(best[part], found, k)
    return torch.cat([cosine for cosine, _ in best]), torch.cat([index for _, index in best])


def grouped_topk(values: Tensor, k: int, above: Tensor | None = None) -> Neighbors:
    """Return `values.topk(k, dim=1)` of (Q, n), in a fraction of its time if n is many times k.

    With `above` (Q, 1), only larger values are asked for, and fewer than k may come back.
    """
    num_rows, num_columns = values.shape
    # Columns are taken in groups. The k best values lie in the k groups with the largest maxima,
    # so a topk over the maxima and a topk over the k chosen groups give the result. The total work
    # n / size + k * size is smallest at size = sqrt(n / k).
    size = math.isqrt(num_columns // k)
    num_groups = num_columns // max(size, 1)
    if size < 4:  # too few columns per group to gain anything
        return values.topk(k, dim=1)

    # Column = place in the group * num_groups + group: the view needs no copy.
    table = values[:, : size * num_groups].view(num_rows, size, num_groups)
    maxima = table.amax(dim=1)
    # Values larger than `above` lie in groups whose maximum is larger, often in few of them.
    num_chosen = k if above is None else min(k, int((maxima > above).sum(dim=1).max()))
    group = maxima.topk(num_chosen, dim=1, sorted=False).indices
    candidates = table.gather(2, group[:, None].expand(-1, size, -1)).flatten(1)
    place = torch.arange(size, device=values.device)[:, None]
    column = (place * num_groups + group[:, None]).flatten(1)

    # The columns that fill no whole group take part one by one.
    if rest := num_columns - size * num_groups:
        last = torch.arange(num_columns - rest, num_columns, device=values.device)
        candidates = torch.cat([candidates, values[:, -rest:]], dim=1)
        column = torch.cat([column, last.expand(num_rows, -1)], dim=1)
    best, chosen = candidates.topk(min(k, candidates.shape[1]), dim=1)
    return best, column.gather(1, chosen)


def merge_neighbors(one: Neighbors, other: Neighbors, k: int) -> Neighbors:
    """Return the k best of two sorted lists per query."""
    cosine, index = (torch.cat(pair, dim=1) for pair in zip(one, other, strict=True))
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
    """Return top-1 and top-5 accuracy in percent for each (k, temperature T).

    The score of a class is the sum of exp(cosine / T) over the neighbors of that class. Bank and
    queries are whole on every rank; each rank takes its share of the queries, all get the result.

    Raises:
        ValueError: A k exceeds the bank, or features are not finite.
    """
    if not ks or max(ks) > len(bank) or min(ks) < 1:
        raise ValueError(
            f"ks {tuple(ks)} must lie between 1 and the {len(bank)} images of the bank"
        )
    for name, features in (("bank", bank), ("query", queries)):
        # In parts: `isfinite` of everything at once would double the memory of the bank.
        if not all(bool(torch.isfinite(part).all()) for part in torch.split(features, BANK_ROWS)):
            raise ValueError(f"{name} features are not finite")

    own_part = slice(distributed.rank(), None, distributed.world_size())
    cosine, index = find_nearest(bank, queries[own_part], max(ks), memory_mb=memory_mb)
    classes = bank_labels[index]
    own_labels = labels[own_part]

    # Neighbors do not depend on k and T: the search above serves every pair.
    sorted_ks = sorted(ks)
    rows = max(1, memory_mb * MB // (4 * 4 * (num_classes + max(ks))))
    result = {}
    for temperature in temperatures:
        hits = torch.zeros(len(ks), 2, dtype=torch.int64, device=bank.device)
        for first in range(0, len(own_labels), rows):
            part = slice(first, first + rows)
            hits += count_hits(
                cosine[part], classes[part], own_labels[part], temperature, num_classes, sorted_ks
            )
        counts = distributed.all_gather_rows(hits[None]).sum(dim=0).tolist()
        for k, (top1, top5) in zip(sorted_ks, counts, strict=True):
            result[k, temperature] = {
                "top1": 100 * top1 / len(queries),
                "top5": 100 * top5 / len(queries),
            }
    return result


def count_hits(
    cosine: Tensor,
    classes: Tensor,
    labels: Tensor,
    temperature: float,
    num_classes: int,
    ks: Sequence[int],
) -> Tensor:
    """Count the queries whose label scores first and among the first five, (len(ks), 2).

    cosine (Q, K) and classes (Q, K) are those of the neighbors; `ks` ascend.
    """
    weight = torch.exp(cosine / temperature)
    scores = torch.zeros(len(cosine), num_classes, device=cosine.device)
    hits = []
    for used, k in pairwise((0, *ks)):
        # Neighbors join in the order of k, so that a larger k costs only its additional ones.
        scores.scatter_add_(1, classes[:, used:k], weight[:, used:k])
        hit = scores.topk(min(5, num_classes), dim=1).indices == labels[:, None]
        hits.append(torch.stack([hit[:, 0].sum(), hit.any(dim=1).sum()]))
    return torch.stack(hits)
