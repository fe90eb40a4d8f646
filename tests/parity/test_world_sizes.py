"""The mini recipe on 1, 2 and 4 ranks: the same samples, and losses that differ by rounding alone.

In double precision, so that nothing but a difference in what is computed could show, and in float32, as trained, where
rounding grows from step to step by batch normalisation and a high learning rate. MUGS_STEPS sets how many are taken.
"""

import json
import os
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from step_cases import float64

from mugs.data.digits import materialize_digits
from mugs.data.source import FolderSource
from mugs.engine import distributed
from mugs.engine.train import Pretraining, pretrain
from mugs.methods import Mugs, MugsConfig
from pipeline import config, plan
from stages import STAGES
from stages.pretrain import PretrainConfig, train_config

STEPS = int(os.environ.get("MUGS_STEPS", "22"))
WORLDS = (1, 2, 4)


def mini() -> PretrainConfig:
    """The pretraining of the demo, one line of metrics for each of its steps."""
    epochs = max(1, STEPS // 22)
    options = [f"pretrain.epochs={epochs}", "pretrain.log_steps=1", "pretrain.checkpoint_steps=100000"]
    if epochs <= 4:  # all of it would be warm-up
        options.append("pretrain.warmup_epochs=0")
    runs = plan.build_plan(config.load("mini", STAGES, options))
    (found,) = [run.config for run in runs if isinstance(run.config, PretrainConfig)]
    return found


def train(data: Path, out: Path) -> None:
    """This rank's part of the run; notes the samples of every step."""
    cfg = mini()
    method = Mugs(MugsConfig(arch=cfg.arch, **cfg.mugs.model_dump()), seed=cfg.seed)
    out.mkdir(parents=True, exist_ok=True)
    task = Pretraining(method, FolderSource(data), train_config(cfg), out, torch.device("cpu"))
    samples = [task.order.indices(step).tolist() for step in range(task.total_steps)]
    (out / f"samples_{distributed.rank()}.json").write_text(json.dumps(samples))
    pretrain(method, FolderSource(data), train_config(cfg), out, torch.device("cpu"))


def on_rank(rank: int, world: int, port: int, exact: bool, data: Path, out: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init(timeout_minutes=2)
    try:
        with float64() if exact else nullcontext():
            train(data, out)
    finally:
        distributed.shutdown()


def run(world: int, exact: bool, data: Path, out: Path) -> tuple[list[dict[str, Any]], list[set[int]]]:
    """Lines of metrics, and the samples of each step over all ranks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    mp.spawn(on_rank, args=(world, port, exact, data, out), nprocs=world)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]  # others tell of checkpoints
    shares = [json.loads((out / f"samples_{rank}.json").read_text()) for rank in range(world)]
    return lines, [set().union(*parts) for parts in zip(*shares, strict=True)]


def largest_difference(ones: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    names = [name for name in ones[0] if name.startswith("loss")]
    assert len(names) == 4
    pairs = zip(ones, others, strict=True)
    return max(abs(one[name] - other[name]) / abs(one[name]) for one, other in pairs for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(("exact", "bound"), [(True, 1e-9), (False, 1e-3)], ids=["float64", "float32"])
def test_same_losses(tmp_path: Path, exact: bool, bound: float) -> None:
    materialize_digits(tmp_path / "digits")
    data = tmp_path / "digits" / "train"
    alone, samples = run(1, exact, data, tmp_path / "1")
    assert len(alone) >= STEPS // 22 * 22
    for world in WORLDS[1:]:
        lines, parts = run(world, exact, data, tmp_path / str(world))
        assert parts == samples
        difference = largest_difference(alone, lines)
        print(f"{world} ranks, {len(lines)} steps: losses differ by at most {difference:.1e} of their value")
        assert difference < bound
