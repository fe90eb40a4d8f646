"""The released fine-tuning recipes, row by row.

Learning rates of the transfer rows belong to a batch of 512 and are scaled with the batch. Rows E7 to E17 and E20 of
the recipe's list of defects apply.
"""

from typing import Any, Literal

# ImageNet-1K with all labels. Validation resizes bilinearly here, bicubically everywhere else.
_IMAGENET: dict[str, Any] = {
    "batch_size": 1024,
    "weight_decay": 0.05,
    "head": {"kind": "linear", "scale": 0.001},
    "images": {"erase_prob": 0.25, "eval_interpolation": "bilinear"},
    "precision": "bf16",
}


def _imagenet(
    epochs: int, warmup: int, lr: float, decay: float, drop_path: float, group: int
) -> dict[str, Any]:
    """`group`: images per GPU in the released run, which share a mixup draw."""
    rate = {
        "base_lr": lr,
        "unit": "step",
        "warmup_epochs": warmup,
        "warmup_lr": 0.0,
        "min_lr": 1e-6,
    }
    own = {
        "epochs": epochs,
        "rate": rate,
        "layer_decay": decay,
        "drop_path": drop_path,
        "mix": {"group": group},
    }
    return {**_IMAGENET, **own}


_RATE = {
    "unit": "epoch",
    "warmup_epochs": 5,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "epoch_lag": True,
    "lr_batch": 512,
}


def _semi(batch_size: int, percent: float) -> dict[str, Any]:
    """ImageNet-1K with few labels; the 1% rate rises from 5e-6 to its "minimum" 1e-5, as released (E11)."""
    return {
        "epochs": 1000,
        "batch_size": batch_size,
        "rate": {**_RATE, "base_lr": 5e-6},
        "weight_decay": 0.05,
        "drop_path": 0.1,
        "head": {"kind": "mlp", "hidden": 2048},
        "images": {"erase_prob": 0.25},
        "mix": {"group": 128},
        "labelled": {"percent": percent},
        "precision": "bf16",
    }


def _transfer(
    epochs: int, lr: float, *, weight_decay: float = 0.05, drop_path: float = 0.1
) -> dict[str, Any]:
    """Another data set: four GPUs of 192 images, three views of each image per epoch."""
    return {
        "epochs": epochs,
        "batch_size": 768,
        "rate": {**_RATE, "base_lr": lr},
        "weight_decay": weight_decay,
        "drop_path": drop_path,
        "repeats": 3,
        "images": {"erase_prob": 0.1},
        "mix": {"group": 192},
        "precision": "bf16",
    }


Preset = Literal[
    "imagenet_vit_s16",
    "imagenet_vit_b16",
    "imagenet_vit_l16",
    "imagenet_vit_l16_script",
    "semi_1pct",
    "semi_10pct",
    "cifar10_vit_s16",
    "cifar10_vit_b16",
    "cifar100_vit_s16",
    "cifar100_vit_b16",
    "inat18_vit_s16",
    "inat18_vit_b16",
    "inat19_vit_s16",
    "inat19_vit_b16",
    "flowers102_vit_s16",
    "flowers102_vit_b16",
    "cars_vit_s16",
    "cars_vit_b16",
]

PRESETS: dict[Preset, dict[str, Any]] = {
    "imagenet_vit_s16": _imagenet(200, 20, 1.2e-3, 0.55, 0.1, 256),
    "imagenet_vit_b16": _imagenet(100, 20, 1.2e-3, 0.55, 0.2, 128),
    "imagenet_vit_l16": _imagenet(50, 5, 8e-4, 0.65, 0.3, 64),  # E13: what the released log says
    "imagenet_vit_l16_script": {**_imagenet(50, 5, 8e-4, 0.75, 0.3, 64), "batch_size": 512},
    "semi_1pct": _semi(512, 1.0),
    "semi_10pct": _semi(1024, 10.0),  # E17: 8 GPUs, as the script
    "cifar10_vit_s16": _transfer(1000, 3e-6),  # E11: the peak is below the minimum, the rate rises
    "cifar10_vit_b16": _transfer(1000, 7.5e-6),
    "cifar100_vit_s16": _transfer(1000, 7.5e-6, weight_decay=0.02),
    "cifar100_vit_b16": _transfer(1000, 7.5e-6),
    "inat18_vit_s16": _transfer(360, 3e-5),
    "inat18_vit_b16": _transfer(360, 1.5e-5),
    "inat19_vit_s16": _transfer(360, 7.5e-5),
    "inat19_vit_b16": _transfer(360, 3e-5),
    "flowers102_vit_s16": _transfer(1000, 7.5e-5),
    "flowers102_vit_b16": _transfer(1000, 7.5e-5),
    "cars_vit_s16": _transfer(1000, 1.5e-4),
    "cars_vit_b16": _transfer(1000, 1.5e-4, drop_path=0.3),
}
