"""Our backbones for timm: the same names and tensors, tried before they are written."""

import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Literal

import timm
import torch

from mugs.checkpoint.tensors import write_tensors
from mugs.models.config import ViTConfig
from mugs.models.vit import ViT
from mugs.weights.backbone_file import load_backbone, load_strictly
from mugs.weights.foreign import check_same_class_token
from pipeline.files import replace_atomically

# In the head of every file, by which we know that it may be replaced.
MARK = "mugs-repro-export"
# By width and depth. timm takes any other shape through the arguments of FALLBACK_NAME.
TIMM_NAMES = {
    (384, 12): "vit_small_patch16_224",
    (768, 12): "vit_base_patch16_224",
    (1024, 24): "vit_large_patch16_224",
}
FALLBACK_NAME = "vit_small_patch16_224"


def timm_arguments(shape: ViTConfig) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` for a shape."""
    return {
        "model_name": TIMM_NAMES.get((shape.embed_dim, shape.depth), FALLBACK_NAME),
        "num_classes": 0,
        "img_size": shape.image_size,
        "patch_size": shape.patch_size,
        "embed_dim": shape.embed_dim,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
    }


def format_timm_call(shape: ViTConfig) -> str:
    """Return the call that makes timm's model, as text."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in timm_arguments(shape).items())
    return f"timm.create_model({arguments})"


@torch.no_grad()
def load_vit_for_timm(path: Path) -> ViT:
    """Load one of our files, and check that timm's model gives an image the same class token.

    Raises:
        WeightsError: it does not.
    """
    vit = load_backbone(path).eval()
    model = timm.create_model(**timm_arguments(vit.config)).eval()
    load_strictly(model, vit.state_dict(), f"{path}: timm's model does not take it")
    # The same class token for one image: names and shapes alone do not prove the same network.
    image = torch.randn(
        1,
        3,
        vit.config.image_size,
        vit.config.image_size,
        generator=torch.Generator().manual_seed(0),
    )
    # Without a head, timm returns the class token after the final LayerNorm.
    check_same_class_token(vit.cls_feature(image), model(image), f"{path}: timm's")
    return vit


def write_bare_weights(path: Path, vit: ViT, format: Literal["timm", "safetensors"]) -> None:
    """Write names and tensors only, for `torch.load` ("timm") or as safetensors."""
    state = {key: value.contiguous() for key, value in vit.state_dict().items()}
    with replace_atomically(path) as temporary:
        if format == "timm":
            # torch puts the name of the file into it, so the name of a temporary file would make
            # other bytes each time.
            folder = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
            folder.mkdir()
            try:
                torch.save(state, folder / f"{MARK}.pth")
                os.replace(folder / f"{MARK}.pth", temporary)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        else:
            write_tensors(temporary, state, {"format": "pt", "written_by": MARK})
