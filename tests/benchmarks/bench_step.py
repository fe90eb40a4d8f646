"""Steps of a tiny network, in one run.

The training step of Mugs is compared with one of the release's shape (`release_step.py`). The
losses of Mugs and the steps of the other methods are compared with the loops that tests take as the
truth, which are no rival; the masks of iBOT with the time that they may take.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from method_cases import TINY_VIT, MethodCase
from naive_dino import NaiveDino
from naive_ibot import NaiveIbot
from naive_mgc import NaiveMgc
from naive_mugs import NaiveMugs
from release_step import ReleasedStep
from step_cases import SCHEDULE, SMALLEST, Case, build

from mugs.data.loading.batch import Views
from mugs.distributed import all_reduce_and
from mugs.engine.optim import build_pretrain_adamw
from mugs.methods.config import DinoConfig, IbotConfig, MgcConfig
from mugs.methods.ibot_masks import SampleDraws, draw_mask, draw_ratio
from mugs.pretrain.config import StepConfig
from mugs.pretrain.step import Trainer
from mugs.random_streams import SampleStream, make_generator

CASE = Case(
    replace(SMALLEST, queue_size=4096, memory_size=4096, num_prototypes=1024),
    num_small=10,
    batch=16,
)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(
    name: str, ours: Callable[[], Any], naive: Callable[[], Any], note: str
) -> dict[str, Any]:
    ours(), naive()
    pairs = [(seconds(ours), seconds(naive)) for _ in range(3)]
    mine, theirs = (median(column) for column in zip(*pairs, strict=True))
    return {
        "name": name,
        "ours": mine,
        "baseline": theirs,
        "ratio": median(b / a for a, b in pairs),
        "unit": "s",
        "note": note,
    }


def watchdog(trainer: Trainer, views: Views) -> dict[str, Any]:
    """What deciding whether a step is finite, and acting on it, takes of the step, on one rank."""
    norms = torch.stack([p.detach().norm() for p in trainer.parameters])
    queue = trainer.method.extra_state.instance_queue
    rows = queue.rows[: CASE.batch].clone()

    def check() -> None:
        finite = all_reduce_and(torch.isfinite(norms).all() & torch.isfinite(norms[0]))
        for _ in range(2):  # two queues, or memories, of each kind
            torch.where(finite, rows, queue.rows[: CASE.batch])
            torch.where(finite, rows, queue.rows[: CASE.batch])
        torch.where(finite, 0.99, 1.0), torch.where(finite, 0.01, 0.0), (~finite).to(torch.float32)

    check()
    spent, step = (
        median(seconds(work) for _ in range(9))
        for work in (check, lambda: trainer.step([views], 2))
    )
    return {
        "name": "watchdog_share",
        "ours": spent,
        "baseline": step,
        "ratio": spent / step,
        "unit": "s",
        "note": f"of a step of a tiny network; {1e6 * spent:.0f} us whatever the network",
    }


def method_step(
    name: str, case: MethodCase, naive_of: Callable[[Any, float], Any]
) -> dict[str, Any]:
    """A step of a method against its naive reference."""
    method = case.build()
    naive = naive_of(case.build(), 3.0)
    views = case.views(0)
    optimizer = build_pretrain_adamw(method.student, 1.0, case.decay)
    trainer = Trainer(method, optimizer, SCHEDULE, StepConfig(), method.student)
    rates = {"epoch": 1, "lr": 1e-4, "wd": 0.04, "momentum": 0.99, "frozen": False}
    return compare(
        f"train_step_{name}",
        lambda: trainer.step([views], 2),
        lambda: naive.step(views, **rates),
        f"batch {case.batch}, {2 + case.num_small} student crops, against the loops of the tests",
    )


DINO = MethodCase(
    DinoConfig(arch=TINY_VIT, drop_path=0.0, head_hidden=64, bottleneck=32, num_prototypes=1024),
    num_small=8,
    batch=16,
)


def mask_some(num: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The first crop of each image with 5 of its 16 patches masked, the second without a mask."""
    masks = torch.zeros(num, 2, 4, 4, dtype=torch.bool)
    masks[:, 0, :, 1] = True
    masks[:, 0, 0, 0] = True
    return {"masks": masks}


IBOT = MethodCase(
    IbotConfig(arch=TINY_VIT, drop_path=0.0, head_hidden=64, bottleneck=32, num_prototypes=1024),
    num_small=8,
    batch=16,
    extras=mask_some,
)


def draw_boxes(num: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Boxes (left, top, width, height) of two crops that share more than half, and flips."""
    corners = torch.randint(0, 20, (num, 2, 2), generator=generator)
    sizes = torch.randint(70, 90, (num, 2, 2), generator=generator)
    flips = torch.rand(num, 2, generator=generator) < 0.5
    return {"boxes": torch.cat([corners, sizes], dim=-1), "flips": flips}


MGC = MethodCase(
    MgcConfig(
        arch=replace(TINY_VIT, positions="sincos"),
        drop_path=0.0,
        head_hidden=64,
        head_out=32,
        windows=(1, 2, 4),
    ),
    num_small=0,
    batch=16,
    decay="all",
    extras=draw_boxes,
)


def mask_time() -> dict[str, Any]:
    """The two masks of an image, with the published settings, against the 0.1 ms they may take."""
    options = IbotConfig()
    generators = [make_generator(0, 0, n, SampleStream.ANNOTATIONS) for n in range(2000)]

    def draw() -> None:
        for generator in generators:
            draws = SampleDraws(generator)
            for _ in range(2):
                ratio = draw_ratio(draws, options.mask_ratios, options.mask_half_widths)
                draw_mask(draws, 14, ratio, options.mask_shape)

    # Time of this process, as the threads of a loader share the cores with others.
    start = time.process_time()
    draw()
    spent = (time.process_time() - start) / len(generators)
    return {
        "name": "ibot_masks",
        "ours": spent,
        "baseline": 1e-4,
        "ratio": 1e-4 / spent,
        "unit": "s",
        "note": "two block masks of an image, against 0.1 ms",
    }


def run() -> list[dict[str, Any]]:
    torch.set_num_threads(2)
    method, naive = build(CASE), NaiveMugs(build(CASE), clip=3.0)
    released = ReleasedStep(build(CASE), clip=3.0)
    views = CASE.views(0)
    trainer = Trainer(
        method, build_pretrain_adamw(method.student), SCHEDULE, StepConfig(), method.student
    )
    rates = {"epoch": 1, "lr": 1e-4, "wd": 0.04, "momentum": 0.99}
    note = "batch 16, 12 student crops, queue and memory 4096"
    return [
        compare(
            "loss_step",
            lambda: method.compute_losses(method.student, views, 1),
            lambda: naive.losses(views, 1),
            f"{note}, against the loops of the tests",
        ),
        compare(
            "train_step_fp32",
            lambda: trainer.step([views], 2),
            lambda: released.step(views, **rates),
            f"{note}, against a step of the release's shape",
        ),
        watchdog(trainer, views),
        method_step("dino", DINO, NaiveDino),
        method_step("ibot", IBOT, NaiveIbot),
        method_step("mgc", MGC, NaiveMgc),
        mask_time(),
    ]
