"""The released sweep of 360 linear classifiers, trained together, against one and against one after the other.

Cached features of the mini data set's size: 1437 images of width 192, ten classes, batches of 128, with the loop around
it (validation, progress, a checkpoint at the end). The single classifier is a plain torch loop.

The floor is the two matrix products of every step, scores and gradients of 3600 x 192 weights, 0.35 GFLOP: they are
timed alone. No two of the 360 have anything but their features and their start in common, so no product can be spared
in fp32. A single classifier is all overhead: 0.6 ms a step with the loop around it, three times which would take 200
GFLOP/s where the processor this was written on has 75 a core.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_step import seconds
from torch import Tensor, nn

from mugs.engine.loop import train
from mugs.evaluation.linear import LinearProbe, Probing
from mugs.evaluation.linear_data import epoch_order, fixed_batches
from stages.linear import LinearConfig, linear_probe

IMAGES, VALIDATION, WIDTH, CLASSES, EPOCHS, BATCH = 1437, 360, 192, 10, 5, 128


def plain(x: Tensor, y: Tensor, validation: tuple[Tensor, Tensor]) -> None:
    """One classifier of SGD, validated after every epoch."""
    model = nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(EPOCHS):
        for ids in torch.randperm(IMAGES).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
        with torch.no_grad():
            (model(validation[0]).topk(5).indices == validation[1][:, None]).float().mean()


def products(x: Tensor) -> None:
    """The two products of every step of the sweep, and of every validation."""
    weight, gradient = torch.randn(360 * CLASSES, WIDTH), torch.empty(360 * CLASSES, WIDTH)
    for _ in range(EPOCHS):
        for features in x.split(BATCH):
            torch.mm(torch.mm(weight, features.T), features, out=gradient)
        torch.mm(weight, x[:VALIDATION].T)


def run() -> list[dict[str, Any]]:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    x, val = (torch.randn(n, WIDTH, generator=generator) for n in (IMAGES, VALIDATION))
    y, val_y = (torch.randint(CLASSES, (n,), generator=generator) for n in (IMAGES, VALIDATION))

    def ours(probe: LinearProbe) -> None:
        with tempfile.TemporaryDirectory() as folder:
            order = epoch_order(IMAGES, seed=0, batch_size=BATCH)
            task = Probing(
                probe, fixed_batches(x, y, order), order.steps_per_epoch, (val, val_y), CLASSES, Path(folder)
            )
            train(task, Path(folder) / "checkpoints", every=10**6)

    one = linear_probe(LinearConfig(batch_size=BATCH, epochs=EPOCHS))
    sweep = linear_probe(LinearConfig(sweep={}, batch_size=BATCH, epochs=EPOCHS))
    works = [lambda: ours(sweep), lambda: ours(one), lambda: plain(x, y, (val, val_y)), lambda: products(x)]
    for work in works:
        work()
    times = [[seconds(work) for work in works] for _ in range(3)]
    together, alone, loop, floor = (sorted(column)[1] for column in zip(*times, strict=True))
    cost = f"360 together cost {together / alone:.1f} times one of ours, {together / loop:.1f} times a plain loop"
    note = f"{cost}; their matrix products alone {floor / alone:.1f} times one of ours, {100 * floor / together:.0f}%"
    ratio = 360 * loop / together
    return [
        {"name": "linear_sweep", "ours": together, "baseline": 360 * loop, "ratio": ratio, "unit": "s", "note": note}
    ]
