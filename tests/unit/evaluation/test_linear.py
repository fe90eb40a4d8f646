"""The linear probe against a plain loop, its last batch, and its resumption."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mugs.data.order import Order
from mugs.evaluation.linear import Batches, LinearProbe, new_classifier, train_probe

NUM, WIDTH, CLASSES = 50, 16, 5
PROBE = LinearProbe(base_lr=0.5, final_lr=1e-3, batch_size=16, epochs=7, seed=3)


def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM, WIDTH, generator=generator), torch.arange(NUM) % CLASSES


def batches() -> Callable[[int], Batches]:
    x, y = features()
    order = Order(NUM, seed=PROBE.seed, world=1, rank=0, batch_size=PROBE.batch_size, short_last=True)

    def train(epoch: int) -> Batches:
        for within in range(order.steps_per_epoch):
            ids = torch.from_numpy(order.indices(epoch * order.steps_per_epoch + within))
            yield x[ids], y[ids]

    return train


def test_same_weights_as_a_plain_loop(tmp_path: Path) -> None:
    """SGD with momentum 0.9, no weight decay, cosine per epoch, four batches of 16, 16, 16 and 2."""
    x, y = features()
    plain = new_classifier(WIDTH, CLASSES, PROBE.seed)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5 * 16 / 256, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7, eta_min=1e-3)
    order = Order(NUM, seed=PROBE.seed, world=1, rank=0, batch_size=NUM)
    for epoch in range(7):
        ids = torch.from_numpy(order.permutation(epoch))
        assert sorted(ids.tolist()) == list(range(NUM))
        for batch in ids.split(16):
            optimizer.zero_grad()
            F.cross_entropy(plain(x[batch]), y[batch]).backward()
            optimizer.step()
        cosine.step()

    ours = new_classifier(WIDTH, CLASSES, PROBE.seed)
    start = ours.weight.detach().clone()
    history = train_probe(PROBE, ours, batches(), (x, y), tmp_path)
    assert (ours.weight - start).abs().max() > 0.05
    torch.testing.assert_close(ours.weight, plain.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.bias, plain.bias, atol=1e-5, rtol=0)
    top1 = 100 * (plain(x).argmax(1) == y).float().mean().item()
    assert history[-1].top1 == pytest.approx(top1) and len(history) == 7


def test_resumed_probe_ends_the_same(tmp_path: Path) -> None:
    def train(folder: Path, stop: int) -> Tensor:
        def until(epoch: int) -> Batches:
            if epoch == stop:
                raise KeyboardInterrupt
            return batches()(epoch)

        classifier = new_classifier(WIDTH, CLASSES, PROBE.seed)
        train_probe(PROBE, classifier, until, features(), folder)
        return classifier.weight.detach()

    straight = train(tmp_path / "straight", stop=99)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", stop=4)
    assert torch.equal(train(tmp_path / "resumed", stop=99), straight)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_short_last_batch_over_ranks(world: int) -> None:
    """Every image once but for those that make the ranks equal; all ranks take the same number."""
    orders = [Order(NUM, seed=1, world=world, rank=r, batch_size=16, short_last=True) for r in range(world)]
    parts = [[order.indices(step) for order in orders] for step in range(orders[0].steps_per_epoch)]
    assert [sum(map(len, part)) for part in parts] == [16, 16, 16, 2 if world < 4 else 4]
    assert all(len({len(p) for p in part}) == 1 for part in parts)
    seen = np.concatenate([p for part in parts for p in part])
    assert set(seen) == set(range(NUM)) and len(seen) - NUM == -NUM % world


def test_a_batch_larger_than_the_data_set_is_one_short_batch() -> None:
    order = Order(NUM, seed=1, world=1, rank=0, batch_size=64, short_last=True)
    assert order.steps_per_epoch == 1 and len(order.indices(1)) == NUM
