"""The first steps of the mini recipe on 1, 2 and 4 ranks: the same samples,
and losses that differ by rounding alone.

In double precision, so that nothing but a difference in what is computed could show, and in
float32, as trained. There the choice of the nearest neighbors is a step: of two that are equally
near but for rounding, another number of ranks may take the other, and the losses move by up to 1e-5
at once and further apart from then on. So float32 is compared twice: with the choices of the run on
one rank, to which the bound of 1e-4 applies, and with free choices. MUGS_STEPS sets how many steps
are taken; after eight at the latest, the queues and memories of 512 rows are full.

Other methods, whose masks and boxes come with the samples, are compared in double precision.
"""

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import spawn
from step_cases import float64
from stopping import StopAfter, StoppedError

from mugs import distributed
from mugs.data.mini.digits import materialize_digits
from mugs.data.sources.folder import FolderSource
from mugs.methods.config import METHODS
from mugs.models.memory import NeighborMemory
from mugs.pretrain.train import PretrainTask, pretrain
from pipeline import config, plan
from stages import STAGES
from stages.pretrain import PretrainConfig

STEPS = int(os.environ.get("MUGS_STEPS", "10"))
BATCH = 64


class Choices:
    """Notes the neighbors that a run on one rank chooses,
    or makes the ranks of another run choose the same.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.calls = file, 0
        self.noted: list[torch.Tensor] = []

    def note(self) -> None:
        nearest = NeighborMemory.find_slots

        def noting(memory: NeighborMemory, query: torch.Tensor, num: int) -> torch.Tensor:
            slots = nearest(memory, query, num)
            if not query.is_meta:  # the count of FLOPs chooses nothing
                self.noted.append(slots)
            return slots

        NeighborMemory.find_slots = noting  # type: ignore[method-assign]

    def repeat(self) -> None:
        """Queries are crops by images, and each rank has a slice of the images."""
        nearest = NeighborMemory.find_slots
        noted, share = torch.load(self.file), BATCH // distributed.world_size()
        mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)

        def noted_before(memory: NeighborMemory, query: torch.Tensor, num: int) -> torch.Tensor:
            if query.is_meta:
                return nearest(memory, query, num)
            slots = noted[self.calls].view(-1, BATCH, num)[:, mine]
            self.calls += 1
            return slots.flatten(0, 1)

        NeighborMemory.find_slots = noted_before  # type: ignore[method-assign]

    def save(self) -> None:
        torch.save(self.noted, self.file)


def plan_pretraining(method: str) -> PretrainConfig:
    """The method's pretraining on the demo data, one line of metrics for each of its steps."""
    every = config.load_reproduction("mini_methods", STAGES).runs
    name = next(n for n, run in every.items() if getattr(run.config, "method", "") == method)
    sets = [f"{name}.log_steps=1", f"{name}.checkpoint_steps=100000"]
    runs = plan.build_plan(config.load_reproduction("mini_methods", STAGES, sets))
    (found,) = [run.config for run in runs if run.name == name]
    assert isinstance(found, PretrainConfig)
    assert (found.method, found.batch_size) == (method, BATCH)
    return found


def train(name: str, data: Path, out: Path) -> None:
    """This rank's part of the run; notes the samples of every step."""
    cfg = plan_pretraining(name)
    method = METHODS[name].build(replace(cfg.options, arch=cfg.arch), seed=cfg.seed)
    out.mkdir(parents=True, exist_ok=True)
    task = PretrainTask(method, FolderSource(data), cfg, out, torch.device("cpu"))
    samples = [task.order.indices(step).tolist() for step in range(STEPS)]
    (out / f"samples_{distributed.rank()}.json").write_text(json.dumps(samples))
    with pytest.raises(StoppedError):
        pretrain(method, FolderSource(data), cfg, out, torch.device("cpu"), StopAfter(STEPS))


def on_rank(_rank: int, method: str, exact: bool, repeat: bool, data: Path, out: Path) -> None:
    choices = Choices(out.parent / "choices.pt")
    with ExitStack() as stack:
        if exact:
            stack.enter_context(float64())
        if distributed.world_size() == 1:
            choices.note()
            stack.callback(choices.save)
        elif repeat:
            choices.repeat()
        train(method, data, out)


def run(
    world: int, data: Path, out: Path, *, exact: bool, repeat: bool = False, method: str = "mugs"
) -> tuple[list[dict[str, Any]], list[set[int]]]:
    """Lines of metrics, and the samples of each step over all ranks."""
    spawn(on_rank, world, method, exact, repeat, data, out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]  # others tell of checkpoints
    shares = [json.loads((out / f"samples_{rank}.json").read_text()) for rank in range(world)]
    return lines, [set().union(*parts) for parts in zip(*shares, strict=True)]


def differences(ones: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, float]:
    """The largest difference of each loss at any step, relative to its value."""
    names = [name for name in ones[0] if name.startswith("loss")]
    assert len(names) > 1 and len(ones) == len(others) == STEPS
    pairs = list(zip(ones, others, strict=True))
    return {
        name: max(abs(one[name] - other[name]) / abs(one[name]) for one, other in pairs)
        for name in names
    }


@pytest.mark.slow
@pytest.mark.timeout(600 + 10 * STEPS)
@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32"])
def test_same_losses(tmp_path: Path, exact: bool) -> None:
    check_losses(tmp_path, exact, ("free", 2), ("free" if exact else "repeated", 4))


@pytest.mark.long
@pytest.mark.timeout(600 + 10 * STEPS)
def test_same_losses_in_float32_on_every_number_of_ranks(tmp_path: Path) -> None:
    check_losses(tmp_path, False, ("repeated", 2), ("repeated", 4), ("free", 2), ("free", 4))


BOUNDS = {(True, "free"): 1e-9, (False, "repeated"): 1e-4, (False, "free"): 1e-2}


def check_losses(tmp_path: Path, exact: bool, *others: tuple[str, int]) -> None:
    """Compare runs, by their choices and number of ranks, with one on one rank."""
    materialize_digits(tmp_path / "digits")
    data = tmp_path / "digits" / "train"
    alone, samples = run(1, data, tmp_path / "1", exact=exact)
    for choice, world in others:
        out = tmp_path / f"{choice}_{world}"
        lines, parts = run(world, data, out, exact=exact, repeat=choice == "repeated")
        assert parts == samples
        found = differences(alone, lines)
        shown = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
        print(f"{world} ranks, {STEPS} steps, neighbors {choice}: losses differ by at most {shown}")
        assert max(found.values()) < BOUNDS[exact, choice], shown


@pytest.mark.long
@pytest.mark.timeout(600 + 10 * STEPS)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "mugs"])
def test_same_losses_of_other_methods(tmp_path: Path, method: str) -> None:
    materialize_digits(tmp_path / "digits")
    data = tmp_path / "digits" / "train"
    alone, samples = run(1, data, tmp_path / "1", exact=True, method=method)
    for world in (2, 4):
        lines, parts = run(world, data, tmp_path / str(world), exact=True, method=method)
        assert parts == samples
        assert max(differences(alone, lines).values()) < 1e-9
