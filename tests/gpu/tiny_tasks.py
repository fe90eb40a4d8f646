"""Whole tasks in small, on any device; each returns what it leaves, as tensors on the CPU by name.

For a pretended device (`pretend_run.py`) and for a real one (`test_on_a_gpu.py`).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from step_cases import SMALLEST
from torch import Tensor, nn

from mugs.data.mini.digits import materialize_digits
from mugs.data.sources.folder import FolderSource
from mugs.data.views.config import ViewRecipe
from mugs.models.config import ViTConfig
from mugs.models.vit import ViT, build_vit

State = dict[str, Tensor]
Task = Callable[[torch.device, str, Path], State]


def on_cpu(tensor: Tensor) -> Tensor:
    """The values of a tensor of whatever device."""
    return getattr(tensor, "values_on_cpu", tensor).detach().cpu().float().clone()


def state_of(**modules: nn.Module) -> State:
    return {
        f"{name}.{key}": on_cpu(value)
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }


def digits(folder: Path) -> FolderSource:
    """Handwritten digits, beside the folder of the run."""
    root = folder.parent / "digits"
    if not root.exists():
        materialize_digits(root)
    return FolderSource(root / "val")


def small_vit(size: int, drop_path: float = 0.0, depth: int = 2) -> ViT:
    torch.manual_seed(0)
    shape = ViTConfig(embed_dim=16, depth=depth, num_heads=2, patch_size=8, image_size=size)
    return build_vit(shape, drop_path=drop_path)


def pretrain(device: torch.device, precision: str, folder: Path) -> State:
    from mugs.methods.mugs import Mugs
    from mugs.pretrain.config import TrainConfig
    from mugs.pretrain.train import pretrain as run

    config = TrainConfig(
        epochs=2,
        batch_size=8,
        base_lr=1e-3,
        warmup_epochs=1,
        steps_per_epoch=2,
        checkpoint_steps=3,
        log_steps=2,
        threads=1,
        micro_batch_size=4,
        views=ViewRecipe(large_size=32, small_size=16, num_small=2),
        precision=precision,
    )
    method = Mugs(replace(SMALLEST, drop_path=0.2, memory_size=64, queue_size=64))
    run(method, digits(folder), config, folder, device)
    return state_of(student=method.student, teacher=method.teacher, extra_state=method.extra_state)


def knn(device: torch.device, precision: str, folder: Path) -> State:
    from mugs.evaluation.knn import evaluate_knn

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(830, 16, generator=generator).to(device)
    labels = torch.randint(10, (830,), generator=generator).to(device)
    found = evaluate_knn(
        rows[:700],
        labels[:700],
        rows[700:],
        labels[700:],
        num_classes=10,
        ks=(1, 5, 20),
        temperatures=(0.05, 0.07),
    )
    return {str(key): torch.tensor([x["top1"], x["top5"]]) for key, x in found.items()}


def logistic(device: torch.device, precision: str, folder: Path) -> State:
    from mugs.evaluation.logistic import fit_logistic_regression, top1_accuracy

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 12, generator=generator).to(device)
    labels = torch.randint(5, (200,), generator=generator).to(device)
    found = fit_logistic_regression(features, labels, num_classes=5, penalty=0.1)
    return {
        "weight": on_cpu(found.weight),
        "top1": torch.tensor(top1_accuracy(found.weight, features, labels)),
    }


def finetune(device: torch.device, precision: str, folder: Path) -> State:
    from mugs.finetune.classifier import ImageClassifier, build_head
    from mugs.finetune.config import (
        FinetuneConfig,
        HeadOptions,
        ImageOptions,
        MixOptions,
        RateOptions,
    )
    from mugs.finetune.train import Finetuning

    model = ImageClassifier(small_vit(16, 0.2), build_head(HeadOptions(), 16, 10, seed=1))
    source = digits(folder)
    config = FinetuneConfig(
        epochs=1,
        batch_size=128,
        rate=RateOptions(base_lr=5e-3, warmup_epochs=1),
        images=ImageOptions(size=16, resize=16),
        mix=MixOptions(group=32),
        layer_decay=0.7,
        workers=0,
        checkpoint_steps=3,
        log_steps=2,
        precision=precision,
        micro_batch_size=64,
    )
    task = Finetuning(model, (source, source), config, folder, device, num_classes=10)
    task.train()
    return {**state_of(model=model), "top1": torch.tensor([r.top1 for r in task.history])}


def segmentation(device: torch.device, precision: str, folder: Path) -> State:
    from mugs.data.dense.ade20k import SceneFolder
    from mugs.data.mini.scenes_and_videos import materialize_scenes
    from mugs.transfer.segmentation.config import SceneRecipe, SegmentationConfig
    from mugs.transfer.segmentation.evaluate import evaluate_scenes
    from mugs.transfer.segmentation.model import build_segmenter
    from mugs.transfer.segmentation.train import SegmentationTraining

    root = folder.parent / "scenes"
    if not root.exists():
        materialize_scenes(root, train=8, val=2)
    config = SegmentationConfig(
        variant="upernet",
        num_classes=11,
        channels=12,
        auxiliary_channels=12,
        scenes=SceneRecipe(long_side=128, short_side=64, crop=32, window=32, stride=21),
        steps=2,
        batch_size=4,
        lr=1e-3,
        warmup_steps=1,
        precision=precision,
        workers=0,
        checkpoint_steps=2,
        log_steps=2,
    )
    vit = small_vit(32, 0.3, depth=3)
    vit.set_position_grid(4, 4)
    model = build_segmenter(vit, config, seed=0)
    train = SceneFolder(root, "train", num_classes=11)
    SegmentationTraining(model, train, config, folder, device).train()
    scores = evaluate_scenes(
        model, SceneFolder(root, "val", num_classes=11), config, device, run_dir=folder
    )
    return {**state_of(model=model), "miou": torch.tensor(scores.miou)}


def detection(device: torch.device, precision: str, folder: Path) -> State:
    from detection_cases import SETTINGS, small_detector

    from mugs.data.dense.coco import CocoSplit
    from mugs.data.mini.coco import materialize_coco
    from mugs.transfer.detection.evaluate import detect_split
    from mugs.transfer.detection.train import DetectionTraining

    root = folder.parent / "coco"
    if not root.exists():
        materialize_coco(root, train=6, val=2)
    model = small_detector()
    config = replace(SETTINGS, epochs=1, precision=precision)
    DetectionTraining(model, CocoSplit(root, "train"), config, folder, device).train()
    detect_split(model, CocoSplit(root, "val"), config, folder, device)
    return state_of(model=model)


def attention(device: torch.device, precision: str, folder: Path) -> State:
    from mugs.evaluation.attention import draw_attention

    vit = small_vit(32).eval().to(device)
    source = digits(folder)
    draw_attention(vit, source, [0, 5], folder, resize=32, crop=32, keep=0.6, device=device)
    return {}


TASKS: dict[str, Task] = {
    task.__name__: task
    for task in (pretrain, knn, logistic, finetune, segmentation, detection, attention)
}
