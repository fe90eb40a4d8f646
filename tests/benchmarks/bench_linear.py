"""The released sweep of 360 linear classifiers, trained as one product,
against 360 modules in a loop over shared features, as the release trains them.

Row `linear_sweep`: the training loop. Row `linear_sweep_run`: a run of the stage, against 360 runs
of one classifier, which is what a sweep by hand would be.

Cached features of the mini data set's size: 1437 images of width 192, ten classes, batches of 128,
with the loop around it (validation, progress, a checkpoint at the end).

The floor is the two matrix products of every step, scores and gradients of 3600 x 192 weights, 0.35
GFLOP: they are timed alone. No two of the 360 have anything but their features and their start in
common, so no product can be spared in fp32. A single classifier is all overhead: 0.6 ms a step with
the loop around it, three times which would take 200 GFLOP/s where the processor this was written on
has 75 a core.

Row `linear_sweep_run`: runs of the stage as a user starts them, 50 epochs on the features of an
untrained network, with all that comes before and after.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_step import seconds
from dense_step import row

from mugs.engine.loop import train
from mugs.evaluation.config import LinearProbe
from mugs.evaluation.linear import LinearProbeTraining, build_feature_batches, build_order
from mugs.models.vit import build_vit
from stages.linear import LinearConfig, Sweep, build_probe

ROOT = Path(__file__).resolve().parents[2]
IMAGES, VALIDATION, WIDTH, CLASSES, EPOCHS, BATCH = 1437, 360, 192, 10, 5, 128


def plain(x: torch.Tensor, y: torch.Tensor, validation: tuple[torch.Tensor, torch.Tensor]) -> None:
    """One classifier of SGD, validated after every epoch."""
    model = torch.nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(EPOCHS):
        for ids in torch.randperm(IMAGES).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
        with torch.no_grad():
            (model(validation[0]).topk(5).indices == validation[1][:, None]).float().mean()


def in_a_loop(
    x: torch.Tensor,
    y: torch.Tensor,
    validation: tuple[torch.Tensor, torch.Tensor],
    probe: LinearProbe,
) -> None:
    """All classifiers of a sweep as modules of their own, over the same batches; LARS as SGD."""
    models = [torch.nn.Linear(WIDTH, CLASSES) for _ in probe.settings]
    optimizers = [
        torch.optim.SGD(
            model.parameters(), setting.base_lr, momentum=0.9, weight_decay=setting.weight_decay
        )
        for model, setting in zip(models, probe.settings, strict=True)
    ]
    for _ in range(EPOCHS):
        for ids in torch.randperm(IMAGES).split(BATCH):
            features, labels = x[ids], y[ids]
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(model(features), labels).backward()
                optimizer.step()
        with torch.no_grad():
            for model in models:
                (model(validation[0]).topk(5).indices == validation[1][:, None]).float().mean()


def products(x: torch.Tensor) -> None:
    """The two products of every step of the sweep, and of every validation."""
    weight, gradient = torch.randn(360 * CLASSES, WIDTH), torch.empty(360 * CLASSES, WIDTH)
    for _ in range(EPOCHS):
        for features in x.split(BATCH):
            torch.mm(torch.mm(weight, features.T), features, out=gradient)
        torch.mm(weight, x[:VALIDATION].T)


YAML = """
name: probes
runs:
  digits:
    {{stage: convert, dataset: sklearn_digits, num_classes: 10, train_dir: "builtin:sklearn_digits",
      val_dir: "builtin:sklearn_digits"}}
  weights: {{stage: import, arch: vit_mini, epochs: 0, file: {file}}}
  features:
    {{stage: features, needs: {{data: digits, weights: weights}}, blocks: 1, resize: 32, crop: 32,
      resources: {{gpu: false, ranks_per_node: 1, cpus_per_rank: 2}}}}
"""
PROBE = """
  {name}:
    {{stage: linear, needs: {{features: features}}, feature: cls, {rates}, seed: {seed},
      batch_size: 128, epochs: 50, augmentation: none,
      resources: {{gpu: false, ranks_per_node: 1, cpus_per_rank: 2}}}}
"""


def as_runs(rounds: int = 3) -> dict[str, Any]:
    """Seconds of runs of the stage: the sweep and one classifier by turns."""
    with tempfile.TemporaryDirectory() as folder:
        root, file = Path(folder), Path(folder) / "probes.yaml"
        torch.save(
            {"teacher": build_vit("vit_mini", relation_depth=1).state_dict()}, root / "weights.pth"
        )
        text = YAML.format(file=root / "weights.pth")
        for seed in range(rounds):
            text += PROBE.format(name=f"sweep{seed}", rates="sweep: {}", seed=seed)
            text += PROBE.format(name=f"one{seed}", rates="base_lr: 1.0", seed=seed)
        file.write_text(text)
        call = [sys.executable, "run_stage.py", "run", str(file), "--run-root", str(root)]
        subprocess.run(call, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        entries = [json.loads(path.read_text()) for path in (root / "manifest").glob("*.json")]
    taken = {entry["name"]: float(entry["seconds"]) for entry in entries}
    pairs = sorted((taken[f"sweep{seed}"] / taken[f"one{seed}"], seed) for seed in range(rounds))
    together, alone = (taken[f"{name}{pairs[rounds // 2][1]}"] for name in ("sweep", "one"))
    ratios = ", ".join(f"{ratio:.1f}" for ratio, _ in pairs)
    note = f"a run of the 360 costs {ratios} times a run of one ({alone:.1f} s)"
    return row("linear_sweep_run", together, 360 * alone, "s", note)


def run() -> list[dict[str, Any]]:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    x, val = (torch.randn(n, WIDTH, generator=generator) for n in (IMAGES, VALIDATION))
    y, val_y = (torch.randint(CLASSES, (n,), generator=generator) for n in (IMAGES, VALIDATION))

    def ours(probe: LinearProbe) -> None:
        with tempfile.TemporaryDirectory() as folder:
            order = build_order(IMAGES, seed=0, batch_size=BATCH)
            task = LinearProbeTraining(
                probe,
                build_feature_batches(x, y, order),
                order.steps_per_epoch,
                (val, val_y),
                CLASSES,
                Path(folder),
            )
            train(task, Path(folder) / "checkpoints", every=10**6)

    one = build_probe(LinearConfig(batch_size=BATCH, epochs=EPOCHS))
    sweep = build_probe(LinearConfig(sweep=Sweep(), batch_size=BATCH, epochs=EPOCHS))
    assert len(sweep.settings) == 360 and len(one.settings) == 1
    works = [
        lambda: ours(sweep),
        lambda: ours(one),
        lambda: plain(x, y, (val, val_y)),
        lambda: products(x),
        lambda: in_a_loop(x, y, (val, val_y), sweep),
    ]
    for work in works:
        work()
    times = [[seconds(work) for work in works] for _ in range(3)]
    together, alone, loop, floor, released = (
        sorted(column)[1] for column in zip(*times, strict=True)
    )
    note = (
        f"360 together cost {together / alone:.1f} times one of ours, "
        f"{together / loop:.1f} times a plain loop; their matrix products alone "
        f"{floor / alone:.1f} times one of ours, {100 * floor / together:.0f}%"
    )
    return [row("linear_sweep", together, released, "s", note), as_runs()]
