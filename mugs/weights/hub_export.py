"""A backbone of ours as a folder that the Hugging Face Hub and timm take as it is."""

import json
from pathlib import Path
from typing import Any

from mugs.data.views.config import IMAGENET_MEAN, IMAGENET_STD
from mugs.models.config import ViTConfig
from mugs.models.vit import ViT
from mugs.weights.timm_export import MARK, timm_arguments, write_bare_weights
from pipeline.files import write_atomic

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


USUAL_SIZES = (256, 224)
"""Of evaluations on ImageNet: to what the shorter side is resized, and the side of the middle."""


def describe_for_timm(shape: ViTConfig, sizes: tuple[int, int] = USUAL_SIZES) -> dict[str, Any]:
    """Return the content of config.json, by which timm builds the network and its transforms.

    `sizes` are those that images were evaluated with, as in `USUAL_SIZES`.
    """
    resize, crop = sizes
    arguments = timm_arguments(shape)
    architecture = arguments.pop("model_name")
    return {
        "architecture": architecture,
        "num_classes": arguments.pop("num_classes"),
        "num_features": shape.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, shape.image_size, shape.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": crop / resize,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "written_by": MARK,
    }


def write_hub_files(folder: Path, vit: ViT, sizes: tuple[int, int]) -> list[Path]:
    """Write weights and configuration into a folder; return the files."""
    write_bare_weights(folder / WEIGHTS_FILE, vit, "safetensors")
    config = json.dumps(describe_for_timm(vit.config, sizes), indent=1) + "\n"
    return [folder / WEIGHTS_FILE, write_atomic(folder / CONFIG_FILE, config)]
