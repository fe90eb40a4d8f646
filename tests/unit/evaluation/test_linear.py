"""Linear probes against a plain loop, one by one and all together, on one rank and on several, and
resumed.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import spawn
from torch import Tensor, nn

from mugs.checkpoint.save_load import load_latest
from mugs.data.loading.order import SampleOrder
from mugs.engine.loop import train
from mugs.evaluation.config import LinearProbe, Setting
from mugs.evaluation.linear import (
    DivergedError,
    LinearProbeTraining,
    build_feature_batches,
    build_order,
)

NUM, WIDTH, CLASSES = 52, 16, 5
PROBE = LinearProbe(settings=(Setting(0.5),), final_lr=1e-3, batch_size=16, epochs=7, seed=3)
SWEEP = tuple(
    Setting(lr, decay, optimizer)  # type: ignore[arg-type]
    for lr in (0.05, 0.9, 3.0)
    for decay in (0.0, 0.2)
    for optimizer in ("lars", "sgd")
)


def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM, WIDTH, generator=generator), torch.arange(NUM) % CLASSES


def task(folder: Path, probe: LinearProbe = PROBE) -> LinearProbeTraining:
    x, y = features()
    order = build_order(NUM, seed=probe.seed, batch_size=probe.batch_size)
    return LinearProbeTraining(
        probe, build_feature_batches(x, y, order), order.steps_per_epoch, (x, y), CLASSES, folder
    )


def trained(folder: Path, probe: LinearProbe = PROBE, *, every: int = 1000) -> LinearProbeTraining:
    probing = task(folder, probe)
    train(probing, folder / "checkpoints", every=every)
    return probing


class Lars(torch.optim.Optimizer):
    """The update of You et al. written out: tensors with one dimension are neither decayed nor
    scaled.
    """

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    update = update * (0.001 * p.norm() / update.norm())
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(0.9).add_(update)
                p.sub_(group["lr"] * buffer)


def plain(setting: Setting, probe: LinearProbe = PROBE) -> nn.Linear:
    """One classifier in a plain loop: batches of 16, 16, 16 and 4, momentum 0.9, cosine per
    epoch.
    """
    x, y = features()
    model = nn.Linear(WIDTH, CLASSES)
    with torch.no_grad():
        model.weight.copy_(
            torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(3)) * 0.01
        )
        model.bias.zero_()
    peak = setting.base_lr * 16 / 256
    parameters, decay = list(model.parameters()), setting.weight_decay
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        parameters, lr=peak, momentum=0.9, weight_decay=decay
    )
    if setting.optimizer == "lars":
        optimizer = Lars(parameters, decay)
    order = SampleOrder(NUM, seed=probe.seed, world=1, rank=0, batch_size=NUM)
    for epoch in range(probe.epochs):
        rate = 1e-3 + 0.5 * (peak - 1e-3) * (1 + math.cos(math.pi * epoch / probe.epochs))
        optimizer.param_groups[0]["lr"] = rate
        ids = torch.from_numpy(order.permutation(epoch))
        assert sorted(ids.tolist()) == list(range(NUM))
        for batch in ids.split(16):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


def test_same_weights_as_a_plain_loop(tmp_path: Path) -> None:
    x, y = features()
    ours, model = trained(tmp_path), plain(PROBE.settings[0])
    assert ours.classifiers.tensors["weight"][0].std() > 0.05
    torch.testing.assert_close(
        ours.classifiers.tensors["weight"][0], model.weight.data, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        ours.classifiers.tensors["bias"][0], model.bias.data, atol=1e-5, rtol=0
    )
    scores = model(x)
    assert ours.history[-1].top1 == [
        pytest.approx(100 * (scores.argmax(1) == y).float().mean().item())
    ]
    assert ours.history[-1].top5 == [100.0] and len(ours.history) == 7


def test_rates_are_those_of_cosine_annealing() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5 * 16 / 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7, eta_min=1e-3)
    for epoch in range(7):
        assert PROBE.rates(epoch) == pytest.approx(schedule.get_last_lr(), rel=1e-12)
        optimizer.step()
        schedule.step()


def test_a_sweep_is_each_of_its_classifiers_alone(tmp_path: Path) -> None:
    together = trained(tmp_path, replace(PROBE, settings=SWEEP))
    order = [together.probe.settings[i] for i in together.own]
    assert sorted(map(str, order)) == sorted(map(str, SWEEP)) and order[0].optimizer == "sgd"
    for index, setting in enumerate(order):
        model, limit = plain(setting), 1e-4 if setting.optimizer == "sgd" else 1e-7
        torch.testing.assert_close(
            together.classifiers.tensors["weight"][index], model.weight.data, atol=limit, rtol=0
        )
        torch.testing.assert_close(
            together.classifiers.tensors["bias"][index], model.bias.data, atol=limit, rtol=0
        )
    ends = together.classifiers.tensors["weight"]
    apart = (ends[:, None] - ends[None]).abs().amax(dim=(2, 3)) + torch.eye(len(SWEEP))
    assert (
        apart[:6, :6].min() > 1e-3 and apart[6:].min() > 1e-7
    )  # every setting ends somewhere else


def test_resumed_in_mid_epoch_it_ends_the_same(tmp_path: Path) -> None:
    probe = replace(PROBE, settings=SWEEP)
    straight = trained(tmp_path / "straight", probe)

    class Killed(LinearProbeTraining):
        def steps(self, start: int) -> Iterator[None]:
            for step, _ in enumerate(super().steps(start), start):
                if step == 10:  # in the third of the seven epochs of four steps
                    raise KeyboardInterrupt
                yield

    folder = tmp_path / "resumed"
    killed = task(folder, probe)
    killed.__class__ = Killed
    with pytest.raises(KeyboardInterrupt):
        train(killed, folder / "checkpoints", every=5)
    resumed = trained(folder, probe)
    for name, value in straight.classifiers.tensors.items():
        assert torch.equal(resumed.classifiers.tensors[name], value), name
    assert resumed.history == straight.history


def test_best_and_last(tmp_path: Path) -> None:
    probing = trained(tmp_path, replace(PROBE, settings=SWEEP, epochs=3))
    accuracy = torch.tensor([e.top1 for e in probing.history])
    best, last = probing.best(range(3)), probing.best([2])
    assert best.top1 == pytest.approx(accuracy.max().item())
    assert last.top1 == pytest.approx(accuracy[2].max().item()) and last.epoch == 2
    assert probing.history[best.epoch].top1[SWEEP.index(best.setting)] == best.top1
    probing.write_history(tmp_path / "history.csv")
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * len(SWEEP) and lines[1].startswith("0,0.05,0.0,lars,")


def test_diverged_classifiers_are_left_out_until_all_are(tmp_path: Path) -> None:
    x, y = features()
    x[7] = float("inf")
    order = build_order(NUM, seed=3, batch_size=16)
    probing = LinearProbeTraining(
        PROBE, build_feature_batches(x, y, order), order.steps_per_epoch, (x, y), CLASSES, tmp_path
    )
    with pytest.raises(DivergedError, match=r"no finite loss in epoch 1; lower base_lr \(0.5"):
        train(probing, tmp_path / "checkpoints", every=4)
    assert not list((tmp_path / "checkpoints").glob("step_*"))
    good = task(tmp_path, replace(PROBE, settings=SWEEP))
    good.classifiers.groups[0].weight[:, 0] = float("nan")
    steps = good.steps(0)
    for _ in range(4):
        next(steps)
    good.check_before_save()
    bad = good.own[0]
    assert (
        math.isnan(good.history[0].loss[bad])
        and good.history[0].top1[bad] == good.history[0].top5[bad] == 0
    )


def on_rank(_rank: int, folder: Path) -> None:
    for name, settings in SPREAD.items():
        trained(folder / name, replace(PROBE, settings=settings), every=6)


SPREAD = {"one": PROBE.settings, "sweep": SWEEP[:5]}


@pytest.mark.slow
def test_ranks_change_no_number(tmp_path: Path) -> None:
    """Classifiers and batches are divided over two ranks; of a single classifier one gets none."""
    spawn(on_rank, 2, tmp_path)
    for name, settings in SPREAD.items():
        alone = trained(tmp_path / "alone" / name, replace(PROBE, settings=settings))
        found = load_latest(tmp_path / name / "checkpoints")
        assert found is not None
        _, saved, notes = found
        for key, value in alone.state_dicts()["classifiers"].items():
            torch.testing.assert_close(saved["classifiers"][key], value, atol=1e-6, rtol=0)
        assert [e["top1"] for e in notes["history"]] == [e.top1 for e in alone.history]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_short_last_batch_over_ranks(world: int) -> None:
    """Every image once but for those that make the ranks equal; all ranks take the same number."""
    orders = [
        SampleOrder(50, seed=1, world=world, rank=r, batch_size=16, short_last=True)
        for r in range(world)
    ]
    parts = [[order.indices(step) for order in orders] for step in range(orders[0].steps_per_epoch)]
    assert [sum(map(len, part)) for part in parts] == [16, 16, 16, 2 if world < 4 else 4]
    assert all(len({len(p) for p in part}) == 1 for part in parts)
    seen = np.concatenate([p for part in parts for p in part])
    assert set(seen) == set(range(50)) and len(seen) - 50 == -50 % world


def test_a_batch_larger_than_the_data_set_is_one_short_batch() -> None:
    order = SampleOrder(50, seed=1, world=1, rank=0, batch_size=64, short_last=True)
    assert order.steps_per_epoch == 1 and len(order.indices(1)) == 50
