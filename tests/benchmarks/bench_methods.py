"""A full ViT-S/16 training step (batch 8, fp32) of each method, as its bundled reproduction has it.

CPU time of one thread, memory, and floating-point operations; the baseline of every row is Mugs.
Each is measured in a process of its own. Time is that of the second step, without loading images.
Peak memory is what a process adds to the built networks and state; gradients and optimizer moments
count as added.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from dense_step import call_script, row
from torch import Tensor

from mugs.data.loading.batch import Views
from mugs.data.views.annotate import Annotate
from mugs.data.views.config import ViewRecipe
from mugs.data.views.plan import plan_views
from mugs.engine.metering import peak_memory_mb
from mugs.engine.optim import build_pretrain_adamw
from mugs.methods.config import METHODS
from mugs.pretrain.step import Trainer
from mugs.pretrain.train import build_pretrain_schedule
from mugs.random_streams import SampleStream, make_generator
from pipeline import config
from pipeline.plan import build_plan
from stages import STAGES
from stages.pretrain import PretrainConfig

BATCH = 8
EPOCH = 40  # warm-ups are over, masks have begun and prototypes are trained
STEPS_PER_EPOCH = 100
CPU = torch.device("cpu")
RECIPES = {
    "mugs": "mugs_vit_s16_ep100",
    "dino": "dino_vit_s16_ep100",
    "ibot": "ibot_vit_s16_ep100",
    "mgc": "mgc_vit_s16_coco_ep800",
}


@dataclass
class Measured:
    """Of one step: CPU seconds, MB above the built method, TFLOP; and the crops of an image."""

    seconds: float
    added: float
    tflop: float
    crops: str


def read_pretraining(name: str) -> PretrainConfig:
    """Return the settings of a bundled pretraining."""
    runs = build_plan(config.load_reproduction(RECIPES[name], STAGES))
    (found,) = [run.config for run in runs if run.name == "pretrain"]
    assert isinstance(found, PretrainConfig)
    return found


def make_views(recipe: ViewRecipe, annotate: Annotate) -> Views:
    """Return views of noise, with what the method draws of each image."""
    generator = torch.Generator().manual_seed(0)

    def noise(crops: int, size: int) -> Tensor:
        return torch.randn(crops, BATCH, 3, size, size, generator=generator)

    large = noise(recipe.num_large, recipe.large_size)
    small = noise(recipe.num_small, recipe.small_size)
    drawn = [
        annotate(
            make_generator(0, EPOCH, sample, SampleStream.ANNOTATIONS),
            plan_views(0, EPOCH, sample, 500, 375, recipe),
            EPOCH,
        )
        for sample in range(BATCH)
    ]
    extras = {name: torch.from_numpy(np.stack([one[name] for one in drawn])) for name in drawn[0]}
    return Views(large, small, extras)


def measure(name: str) -> Measured:
    torch.set_num_threads(1)
    cfg = read_pretraining(name)
    method = METHODS[name].build(replace(cfg.options, arch=cfg.arch), seed=0)
    optimizer = build_pretrain_adamw(method.student, cfg.patch_lr_scale, decay=cfg.decay)
    schedule = build_pretrain_schedule(cfg, STEPS_PER_EPOCH)
    settings = replace(cfg, precision="fp32")
    trainer = Trainer(method, optimizer, schedule, settings, method.student)
    views = make_views(cfg.views, method.annotate)
    before = peak_memory_mb(CPU)
    for step in range(EPOCH * STEPS_PER_EPOCH, EPOCH * STEPS_PER_EPOCH + 2):
        start = time.process_time()
        assert torch.isfinite(trainer.step([views], step).total)
        seconds = time.process_time() - start
    added = peak_memory_mb(CPU) - before
    recipe = cfg.views
    crops = f"{recipe.num_large} x {recipe.large_size}"
    if recipe.num_small:
        crops += f" + {recipe.num_small} x {recipe.small_size}"
    return Measured(seconds, added, method.count_step_flops(recipe, BATCH) / 1e12, crops)


def run() -> list[dict[str, Any]]:
    measured = {name: Measured(**call_script(__file__, name)) for name in RECIPES}
    mugs = measured["mugs"]
    rows = []
    for name, ours in measured.items():
        note = f"{name}, batch {BATCH}, crops {ours.crops}, against Mugs"
        rows += [
            row(f"step_{name}_cpu", ours.seconds, mugs.seconds, "s", note),
            row(f"step_{name}_memory", ours.added, mugs.added, "MB", note),
            row(f"step_{name}_operations", ours.tflop, mugs.tflop, "TFLOP", note),
        ]
    return rows


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(*sys.argv[1:]))))
