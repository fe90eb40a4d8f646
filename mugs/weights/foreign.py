"""Backbones trained elsewhere (released Mugs checkpoints, plain ViTs of timm) as our ViT."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mugs.checkpoint.tensors import check_header_length
from mugs.data.views.config import IMAGENET_MEAN, IMAGENET_STD
from mugs.models.config import ARCHITECTURES, ViTConfig
from mugs.models.vit import ViT, build_vit
from mugs.weights.backbone_file import (
    LARGEST_FILE,
    State,
    check_positions,
    extract_backbone_state,
    load_backbone,
    load_released_backbone,
    load_strictly,
    remove_wrappers,
)
from mugs.weights.pickle_file import WeightsError, read_released_checkpoint
from pipeline.files import hash_file, open_regular_file

# Of classifiers and reconstruction, which features do not need.
HEAD_PREFIXES = ("head.", "head_dist.", "fc.", "mask_token")
# Relative. Other kernels differ by rounding only.
SAME_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Imported:
    """A backbone, the SHA-256 of its file ("" for a download), and the keys that were left out."""

    vit: ViT
    sha256: str
    discarded: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the backbone's tensors."""
        return sum(tensor.nbytes for tensor in self.vit.state_dict().values())


def import_released(
    arch: str,
    file: str,
    *,
    network: Literal["teacher", "student"] = "teacher",
    sha256: str | None = None,
) -> Imported:
    """Import a released Mugs checkpoint; raise WeightsError with file and keys."""
    digest = verify_sha256(Path(file), sha256)
    vit = build_vit(arch)
    return Imported(vit, digest, load_released_backbone(vit, Path(file), network))


def import_ours(arch: str, file: str, *, sha256: str | None = None) -> Imported:
    """Import one of our backbone files; raise WeightsError if it is none or of another shape."""
    digest = verify_sha256(Path(file), sha256)
    vit = load_backbone(Path(file))
    # The image size may differ: evaluations resize the position table.
    if (known := ARCHITECTURES.get(arch)) is not None and replace(
        vit.config, image_size=known.image_size
    ) != known:
        raise WeightsError(f"{file}: holds {vit.config}, {arch} is {known}")
    return Imported(vit, digest, ())


def import_timm(arch: str, file: str, *, sha256: str | None = None) -> Imported:
    """Import a plain ViT that timm knows by name, from a file or by timm's download ("download").

    Evaluations normalize images as for ImageNet. If the weights need another mean and deviation,
    the difference goes into the patch convolution.

    Raises:
        WeightsError: a key does not fit, or an image gets another class token than through timm.
    """
    reference = build_timm_vit(arch, download=file == "download")
    # A download leaves no file here that could be hashed.
    digest = ""
    discarded: tuple[str, ...] = ()
    if file != "download":
        digest = verify_sha256(Path(file), sha256)
        discarded = load_timm_file(reference, Path(file))
    vit = build_vit(read_timm_config(reference))
    # Extras of timm's other ViTs, such as LayerScale, show as keys that ours lacks.
    load_strictly(vit, reference.state_dict(), f"{arch}: is not a plain ViT")
    config = reference.pretrained_cfg
    fold_normalization(vit, config["mean"], config["std"])
    check_same_as_timm(arch, vit, reference)
    return Imported(vit, digest, discarded)


def build_timm_vit(arch: str, *, download: bool) -> Any:
    """Build timm's model without its head; raise WeightsError for another kind of model."""
    try:
        model = timm.create_model(arch, pretrained=download, num_classes=0)
    except (RuntimeError, ValueError, OSError) as error:
        raise WeightsError(
            f"{arch}: timm cannot make it{' and fetch its weights' * download}: {error}"
        ) from error
    if not isinstance(model, VisionTransformer) or model.cls_token is None:
        raise WeightsError(
            f"{arch}: is a {type(model).__name__} of timm; expected a ViT with a class token"
        )
    return model.eval()


def read_timm_config(model: Any) -> ViTConfig:
    """Return the shape of timm's ViT."""
    return ViTConfig(
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        patch_size=model.patch_embed.patch_size[0],
        image_size=model.patch_embed.img_size[0],
    )


def load_timm_file(model: Any, path: Path) -> tuple[str, ...]:
    """Load a file into timm's model; return the keys of a head, which are left out."""
    others: tuple[str, ...] = ()
    if path.suffix == ".safetensors":
        state = {remove_wrappers(key): value for key, value in read_safetensors(path).items()}
    else:
        checkpoint = read_released_checkpoint(path)
        try:
            state, others = extract_backbone_state(checkpoint)
        except WeightsError as error:
            # Networks by name are those of the release, so only its source lets one choose.
            source = " of source mugs" if "ask for network" in str(error) else ""
            raise WeightsError(f"{path}: {error}{source}") from error
    left_out = tuple(sorted((*others, *(key for key in state if key.startswith(HEAD_PREFIXES)))))
    load_strictly(model, {key: value for key, value in state.items() if key not in left_out}, path)
    check_positions(state, read_timm_config(model), path)
    return left_out


def read_safetensors(path: Path) -> State:
    """Return the tensors of a file; raise WeightsError with its name."""
    try:
        check_header_length(path)
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file: {error}") from error


def verify_sha256(path: Path, expected: str | None) -> str:
    """Return the SHA-256 of a file; raise WeightsError if it is missing or not the expected one."""
    try:
        with open(open_regular_file(path), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
        if size > LARGEST_FILE:
            raise WeightsError(f"{path}: has {size} bytes, which are no weights of a ViT")
        found = hash_file(path)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}; name the file of the weights") from error
    if expected is not None and found != expected:
        raise WeightsError(f"{path}: SHA-256 {found}, expected {expected}")
    return found


@torch.no_grad()
def fold_normalization(vit: ViT, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Make a ViT trained on (pixel - mean) / std take images normalized as for ImageNet.

    With x the ImageNet-normalized pixel, (pixel - mean) / std = x * (ours_std / std) + (ours_mean -
    mean) / std. The factor goes into the weights of the patch convolution, the shift into its bias.
    """
    ours_mean, ours_std, mean_t, std_t = (
        torch.tensor(v) for v in (IMAGENET_MEAN, IMAGENET_STD, mean, std)
    )
    convolution: Any = vit.patch_embed.proj
    # Exact at the border too, since the patch convolution has no padding. The bias comes first: it
    # needs the weights before they are scaled.
    shift = ((ours_mean - mean_t) / std_t).view(1, 3, 1, 1)
    convolution.bias += (convolution.weight * shift).sum(dim=(1, 2, 3))
    convolution.weight *= (ours_std / std_t).view(1, 3, 1, 1)


@torch.no_grad()
def check_same_as_timm(arch: str, vit: ViT, reference: Any) -> None:
    """Raise WeightsError unless both networks give an image the same class token."""
    side = vit.config.image_size
    # One image shows a wrong layout, activation, LayerNorm eps or normalization.
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))

    # Both get the same pixels, each with the normalization of its weights.
    def normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    config = reference.pretrained_cfg
    theirs = reference.forward_features(normalized(config["mean"], config["std"]))[:, 0]
    ours = vit.eval().cls_feature(normalized(IMAGENET_MEAN, IMAGENET_STD))
    check_same_class_token(ours, theirs, f"{arch}: is not a plain ViT: its")


def check_same_class_token(ours: Tensor, theirs: Tensor, whose: str) -> None:
    """Raise WeightsError unless two class tokens agree."""
    apart = float((ours - theirs).abs().max() / theirs.abs().max())
    # "not <", so that NaN fails too.
    if not apart < SAME_TOLERANCE:
        raise WeightsError(f"{whose} class token differs from ours by {apart:.1e} relatively")
