"""Checkpoints, schedules, exact resume; a bad step stops all ranks, harms nothing and is dumped."""

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from ranks import spawn
from step_cases import SMALLEST

from mugs import distributed
from mugs.checkpoint.record import CheckpointError
from mugs.checkpoint.save_load import load_latest, save_checkpoint
from mugs.data.loading.batch import Views
from mugs.data.loading.device import DeviceTransform
from mugs.data.loading.loader import make_loader
from mugs.data.loading.order import SampleOrder
from mugs.data.sources.folder import FolderSource
from mugs.data.views.config import ViewRecipe
from mugs.engine.failures import NonFiniteError
from mugs.engine.optim import build_pretrain_parameter_groups, clip_each_tensor
from mugs.losses.clustering import teacher_temperature_at
from mugs.methods.config import METHODS, DinoConfig, IbotConfig, MgcConfig
from mugs.methods.mugs import Mugs
from mugs.methods.options import MethodOptions
from mugs.pretrain.agreement import StateMismatchError, fingerprint_tensor
from mugs.pretrain.config import StepConfig, TrainConfig
from mugs.pretrain.step import split_micro_batches
from mugs.pretrain.train import draw_micro_batch_uniforms, plan_batches, pretrain

PARTS = {"a": {"x": torch.arange(5.0)}, "b": {"y": torch.ones(2, 2)}}


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "json", "link"])
def test_a_bad_checkpoint_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, 1, PARTS, {})
    file = save_checkpoint(tmp_path, 2, PARTS, {}) / (
        "state.json" if damage == "json" else "a.safetensors"
    )
    if damage == "remove":
        file.unlink()
    elif damage == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "link":  # to what was written, so that size and SHA-256 fit
        file.symlink_to(file.rename(tmp_path / "elsewhere"))
    else:
        os.truncate(file, file.stat().st_size - 3)
    assert load_latest(tmp_path)[0] == 1
    assert str(file) in caplog.text


@pytest.mark.parametrize(
    ("epoch", "temperature"),
    [(-1, 0.04), (0, 0.04), (10, 0.04 + 0.03 * 10 / 29), (29, 0.07), (30, 0.07)],
)
def test_teacher_temperature_rises_linearly(epoch: int, temperature: float) -> None:
    found = teacher_temperature_at(epoch, start=0.04, end=0.07, warmup_epochs=30)
    assert found == pytest.approx(temperature)
    assert teacher_temperature_at(-1, start=0.04, end=0.07, warmup_epochs=0) == 0.04


@pytest.mark.parametrize(("warmup", "temperatures"), [(0, [0.07, 0.07]), (1, [0.04, 0.07])])
def test_short_rises_of_the_teacher_temperature(warmup: int, temperatures: list[float]) -> None:
    found = [
        teacher_temperature_at(epoch, start=0.04, end=0.07, warmup_epochs=warmup)
        for epoch in (0, 1)
    ]
    assert found == pytest.approx(temperatures)


def test_no_good_checkpoint_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (save_checkpoint(tmp_path, 2, PARTS, {}) / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of the 1"):
        load_latest(tmp_path)


def test_clipping_is_per_tensor() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = torch.full((4,), 5.0), torch.full((4,), 0.1)
    assert clip_each_tensor(parameters, 3.0).tolist() == pytest.approx([10.0, 0.2])
    assert parameters[0].grad.norm().item() == pytest.approx(3.0, rel=1e-5)
    assert parameters[1].grad.norm().item() == pytest.approx(0.2)


def test_parameter_groups_follow_the_recipe() -> None:
    method = Mugs(SMALLEST)
    names = {id(p): n for n, p in method.student.named_parameters()}
    groups = build_pretrain_parameter_groups(method.student, 0.2)
    assert len(groups) == 4
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr_scale"] == (0.2 if "patch_embed" in name else 1.0)
            assert group["decay"] == (not name.endswith("bias") and parameter.ndim > 1)


def test_all_parameters_may_have_weight_decay() -> None:
    groups = build_pretrain_parameter_groups(Mugs(SMALLEST).student, 0.2, "all")
    assert [group["decay"] for group in groups] == [True, True]


def test_clip_schedule() -> None:
    config = StepConfig(clip=((0, 3.0), (101, 0.3)))
    assert [config.clip_at(e) for e in (0, 100, 101, 200)] == [3.0, 3.0, 0.3, 0.3]


RESUMED = [
    *(replace(SMALLEST, drop_path=drop_path, queue_size=32) for drop_path in (0.0, 0.3)),
    DinoConfig(arch=SMALLEST.arch, drop_path=0.3, head_hidden=16, bottleneck=8, num_prototypes=24),
    IbotConfig(
        arch=SMALLEST.arch,
        drop_path=0.3,
        head_hidden=16,
        bottleneck=8,
        num_prototypes=24,
        clustering_input="unmasked",
    ),
    MgcConfig(
        arch=replace(SMALLEST.arch, positions="sincos"),
        drop_path=0.3,
        head_hidden=16,
        head_out=8,
        windows=(1, 2, 4),
    ),
]
VIEWS = ViewRecipe(large_size=32, small_size=16, num_small=2)
# MGC compares two large crops that overlap.
OVERLAPPING = replace(VIEWS, num_small=0, large_crops="shared", min_overlap=0.2)


@pytest.mark.parametrize("options", RESUMED, ids=lambda options: type(options).__name__)
def test_resume_is_bitwise_exact(
    tmp_path: Path, digits: FolderSource, options: MethodOptions
) -> None:
    torch.set_num_threads(1)
    (entry,) = [entry for entry in METHODS.values() if entry.options is type(options)]
    config = TrainConfig(
        epochs=2,
        batch_size=8,
        base_lr=1e-2,
        warmup_epochs=1,
        steps_per_epoch=3,
        views=OVERLAPPING if isinstance(options, MgcConfig) else VIEWS,
        checkpoint_steps=2,
    )

    def train(folder: Path) -> Path:
        method = entry.build(options, seed=0)
        pretrain(method, digits, config, folder, torch.device("cpu"))
        return max((folder / "checkpoints").iterdir())

    straight = json.loads((train(tmp_path / "straight") / "state.json").read_text())
    shutil.rmtree(train(tmp_path / "resumed"))  # as if the run had been killed after step 4
    resumed = json.loads((train(tmp_path / "resumed") / "state.json").read_text())
    assert {"student", "teacher", "optimizer", "extra_state"} == {
        Path(name).stem for name in straight["files"]
    }
    assert resumed["files"] == straight["files"]  # SHA-256 of each
    assert resumed["meta"] == straight["meta"]


CONFIG = TrainConfig(
    epochs=2,
    batch_size=8,
    base_lr=1e-2,
    warmup_epochs=1,
    steps_per_epoch=4,
    views=VIEWS,
    checkpoint_steps=2,
    log_steps=1,
    threads=1,
)


def snapshot(method: Mugs) -> dict[str, torch.Tensor]:
    parts = {"student": method.student, "teacher": method.teacher, "state": method.extra_state}
    return {
        f"{p}.{n}": v.clone() for p, module in parts.items() for n, v in module.state_dict().items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def poison(method: Mugs, at: int, here: bool) -> list[dict[str, torch.Tensor]]:
    """Make pixels NaN at the given call of `compute_losses`.

    The returned list gets what the method held just before.
    """
    calls = [0]
    before: list[dict[str, torch.Tensor]] = []

    def poisoned(self: Mugs, student: Callable[..., Any], views: Views, epoch: int) -> Any:
        if not views.large.is_meta:  # the FLOP count is no step
            if calls[0] == at:
                before.append(snapshot(self))
                if here:
                    views = replace(views, large=views.large * torch.nan)
            calls[0] += 1
        return Mugs.compute_losses(self, student, views, epoch)

    # A bound method: a copy of the method, as the FLOP count makes one, then calls its own
    # networks.
    method.compute_losses = MethodType(poisoned, method)  # type: ignore[method-assign]
    return before


def run(folder: Path, data: FolderSource, bad_step: int | None = None, bad_rank: int = 0) -> Mugs:
    method = Mugs(replace(SMALLEST, queue_size=32, drop_path=0.2), seed=0)
    before = [] if bad_step is None else poison(method, bad_step, distributed.rank() == bad_rank)
    try:
        pretrain(method, data, CONFIG, folder, torch.device("cpu"))
        assert bad_step is None
    except NonFiniteError as error:
        assert f"step {bad_step}. " in str(error)  # noqa: PT017 (good runs come here too)
        same(snapshot(method), before[0])
    return method


def replay(method: Mugs, source: FolderSource, step: int) -> dict[str, float]:
    """Losses of this rank's part of a step,
    made again from nothing but its number and the state before it.
    """
    world = distributed.world_size()
    order, micro = plan_batches(len(source), CONFIG)
    with closing(
        make_loader(
            source,
            VIEWS,
            order,
            seed=0,
            annotate=method.annotate,
            loader="thread",
            renderer="fast",
            threads=1,
        )
    ) as loader:
        batch = next(iter(loader.iterate(step, step + 1)))
    (views,) = split_micro_batches(DeviceTransform(torch.device("cpu"), VIEWS)(batch), micro)
    (masks,) = draw_micro_batch_uniforms(method, CONFIG, step, CONFIG.batch_size // world)
    method.set_depth_uniforms(masks)
    losses, _ = method.compute_losses(method.student, views, step // CONFIG.steps_per_epoch)
    return {name: value.item() for name, value in losses.items()}


def check(tmp_path: Path, data: FolderSource, seed: int) -> None:
    """One random bad step on a random rank: stop, dump, continue,
    and end as if nothing had happened.
    """
    world, generator = distributed.world_size(), random.Random(seed)
    bad_step, bad_rank = generator.randrange(1, 8), generator.randrange(world)
    straight = run(tmp_path / "straight", data)
    folder = tmp_path / "failed"
    stopped = run(folder, data, bad_step, bad_rank)
    rank = distributed.rank()
    dump = json.loads(
        (folder / "failures" / f"step_{bad_step:08d}_rank_{rank:04d}.json").read_text()
    )
    order = SampleOrder(len(data), seed=0, world=world, rank=rank, batch_size=8, steps_per_epoch=4)
    assert dump["sample_ids"] == order.indices(bad_step).tolist()
    assert (dump["step"], dump["epoch"]) == (bad_step, bad_step // 4)
    assert (dump["loss"] == "nan") == (rank == bad_rank)
    if rank != bad_rank:
        assert replay(stopped, data, dump["step"]) == dump["losses"]
    same(snapshot(run(folder, data)), snapshot(straight))


def test_one_rank(tmp_path: Path, digits: FolderSource) -> None:
    torch.set_num_threads(1)
    check(tmp_path, digits, seed=1)


def on_rank(rank: int, folder: Path, data: FolderSource) -> None:
    check(folder, data, seed=2)
    method = Mugs(SMALLEST)
    if rank == 1:
        method.extra_state.instance_queue.rows[3, 2] += 1e-3
    with pytest.raises(StateMismatchError, match=r"^instance_queue.rows: "):
        pretrain(method, data, CONFIG, folder / "unequal", torch.device("cpu"))


@pytest.mark.slow
def test_two_ranks(tmp_path: Path, digits: FolderSource) -> None:
    spawn(on_rank, 2, tmp_path, digits)


def test_fingerprint_sees_a_bit_and_an_exchange() -> None:
    rows = torch.randn(40, 3)
    swapped, flipped = (
        rows[torch.randperm(40, generator=torch.Generator().manual_seed(0))],
        rows.clone(),
    )
    flipped.view(torch.int32)[7, 1] ^= 1
    assert torch.equal(fingerprint_tensor(rows), fingerprint_tensor(rows.clone()))
    assert not torch.equal(fingerprint_tensor(rows), fingerprint_tensor(swapped))
    assert not torch.equal(fingerprint_tensor(rows), fingerprint_tensor(flipped))
    assert fingerprint_tensor(torch.zeros((), dtype=torch.int64)).tolist() == [0, 0]
