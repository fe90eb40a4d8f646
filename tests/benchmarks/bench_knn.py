"""k-NN: eight values of k in one pass against one pass per k."""

from typing import Any

import torch
from bench_step import compare

from mugs.evaluation.knn import evaluate_knn

KS = (10, 15, 20, 30, 40, 50, 100, 200)


def run() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(32768, 384, generator=generator), torch.randn(2048, 384, generator=generator)
    bank_labels = torch.randint(1000, (32768,), generator=generator)
    labels = torch.randint(1000, (2048,), generator=generator)

    def evaluate(ks: tuple[int, ...]) -> None:
        evaluate_knn(bank, bank_labels, queries, labels, num_classes=1000, ks=ks, temperatures=(0.07,))

    def one_by_one() -> None:
        for k in KS:
            evaluate((k,))

    return [compare("knn_sweep", lambda: evaluate(KS), one_by_one, "8 k, 32768 x 2048 x 384")]
