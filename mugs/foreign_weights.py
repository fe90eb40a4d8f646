"""Backbones that were trained elsewhere: released Mugs checkpoints and plain ViTs of timm, as our ViT."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mugs.backbones.vit import ARCHITECTURES, ViT, ViTConfig, build_vit
from mugs.data.recipe import IMAGENET_MEAN, IMAGENET_STD
from mugs.weights import (
    KeyReport,
    State,
    WeightsError,
    backbone_state,
    load_backbone,
    load_released_backbone,
    read_checkpoint,
)

HEAD = ("head.", "head_dist.", "fc.", "mask_token")  # of classifiers and reconstruction, which features do not need
SAME = 1e-4


@dataclass(frozen=True)
class Imported:
    """A backbone, the SHA-256 of its file ("" for a download), and the keys of the file that were left out."""

    vit: ViT
    sha256: str
    discarded: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the backbone's tensors."""
        return sum(tensor.nbytes for tensor in self.vit.state_dict().values())


def import_released(
    arch: str, file: str, *, network: Literal["teacher", "student"] = "teacher", sha256: str | None = None
) -> Imported:
    """A released Mugs checkpoint, full or backbone only. Raises WeightsError naming the file and the keys."""
    digest = checked_sha256(Path(file), sha256)
    vit = build_vit(arch)
    report = load_released_backbone(vit, Path(file), network)
    return Imported(vit, digest, report.discarded)


def import_ours(arch: str, file: str, *, network: str = "teacher", sha256: str | None = None) -> Imported:
    """A backbone file of ours. Raises WeightsError where it is none, or of another architecture."""
    if network != "teacher":
        raise WeightsError(f"network {network}: a file of ours holds one network; expected teacher")
    digest = checked_sha256(Path(file), sha256)
    vit = read_ours(Path(file))
    if (known := ARCHITECTURES.get(arch)) is not None and replace(vit.config, image_size=known.image_size) != known:
        raise WeightsError(f"{file}: holds {vit.config}, {arch} is {known}")
    return Imported(vit, digest, ())


def read_ours(path: Path) -> ViT:
    """The backbone in a file of ours. Raises WeightsError naming the file and the keys."""
    state, meta = load_backbone(path)
    try:
        vit = build_vit(ViTConfig(**meta["arch"]))
        key_report(vit.state_dict(), state).check()
        vit.load_state_dict(state)
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{path}: does not say of what shape it is") from error
    except (WeightsError, RuntimeError) as error:
        raise WeightsError(f"{path}: {error}") from error
    return vit


def import_timm(arch: str, file: str, *, network: str = "teacher", sha256: str | None = None) -> Imported:
    """A plain ViT that timm knows by name, from a file or, with `download`, as timm fetches it.

    Evaluations hand over images normalised as for ImageNet; where timm's weights want another mean and deviation, the
    difference goes into the patch convolution. Raises WeightsError unless all keys fit and an image gives the same
    class token as through timm.
    """
    if network != "teacher":
        raise WeightsError(f"network {network}: weights of timm are one network; expected teacher")
    reference = timm_vit(arch, download=file == "download")
    digest = ""
    discarded: tuple[str, ...] = ()
    if file != "download":
        digest = checked_sha256(Path(file), sha256)
        discarded = load_strictly(reference, Path(file))
    vit = build_vit(shape_of(reference))
    report = key_report(vit.state_dict(), reference.state_dict())
    try:
        report.check()
        vit.load_state_dict(reference.state_dict())
    except (WeightsError, RuntimeError) as error:
        raise WeightsError(f"{arch}: is not a plain ViT: {error}") from error
    config = reference.pretrained_cfg
    renormalise(vit, config["mean"], config["std"])
    compare(arch, vit, reference)
    return Imported(vit, digest, discarded)


def timm_vit(arch: str, *, download: bool) -> Any:
    """timm's model without its head. Raises WeightsError for another kind of model."""
    try:
        model = timm.create_model(arch, pretrained=download, num_classes=0)
    except (RuntimeError, ValueError, OSError) as error:
        raise WeightsError(f"{arch}: timm cannot make it{' and fetch its weights' * download}: {error}") from error
    if not isinstance(model, VisionTransformer) or model.cls_token is None:
        raise WeightsError(f"{arch}: is a {type(model).__name__} of timm; expected a ViT with a class token")
    return model.eval()


def shape_of(model: Any) -> ViTConfig:
    """The shape of timm's ViT."""
    return ViTConfig(
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        patch_size=model.patch_embed.patch_size[0],
        image_size=model.patch_embed.img_size[0],
    )


def load_strictly(model: Any, path: Path) -> tuple[str, ...]:
    """Load a `.safetensors` or `.pth` file into timm's model; the keys of a head are left out and returned."""
    state = read_safetensors(path) if path.suffix == ".safetensors" else unwrapped(read_checkpoint(path))
    left_out = tuple(sorted(key for key in state if key.startswith(HEAD)))
    kept = {key: value for key, value in state.items() if key not in left_out}
    report = key_report(model.state_dict(), kept)
    try:
        report.check()
        model.load_state_dict(kept)
    except (WeightsError, RuntimeError) as error:
        raise WeightsError(f"{path}: {error}") from error
    return left_out


def key_report(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> KeyReport:
    """Keys that are missing from, and unexpected in, what is given."""
    return KeyReport(tuple(sorted(set(wanted) - set(given))), tuple(sorted(set(given) - set(wanted))), ())


def read_safetensors(path: Path) -> State:
    """Tensors of a file. Raises WeightsError naming it."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file: {error}") from error


def unwrapped(checkpoint: Mapping[str, Any]) -> State:
    """The weights of a `.pth`, which may hold them below `state_dict` or `model`."""
    for name in ("state_dict", "model"):
        if isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
    return backbone_state(checkpoint)[0]


def checked_sha256(path: Path, expected: str | None) -> str:
    """SHA-256 of a file. Raises WeightsError where the file is not there or not the expected one."""
    try:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}; name the file of the weights") from error
    if expected is not None and found != expected:
        raise WeightsError(f"{path}: SHA-256 {found}, expected {expected}")
    return found


@torch.no_grad()
def renormalise(vit: ViT, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Let a ViT that was trained on (pixel - mean) / std take images normalised as for ImageNet."""
    ours_mean, ours_std, mean_t, std_t = (torch.tensor(v) for v in (IMAGENET_MEAN, IMAGENET_STD, mean, std))
    convolution: Any = vit.patch_embed.proj
    shift = ((ours_mean - mean_t) / std_t).view(1, 3, 1, 1)
    convolution.bias += (convolution.weight * shift).sum(dim=(1, 2, 3))
    convolution.weight *= (ours_std / std_t).view(1, 3, 1, 1)


@torch.no_grad()
def compare(arch: str, vit: ViT, reference: Any) -> None:
    """Raise WeightsError unless both give an image the same class token."""
    side = vit.config.image_size
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    config = reference.pretrained_cfg
    theirs = reference.forward_features(normalised(config["mean"], config["std"]))[:, 0]
    ours = vit.eval().cls_feature(normalised(IMAGENET_MEAN, IMAGENET_STD))
    apart = float((ours - theirs).abs().max() / theirs.abs().max())
    if not apart < SAME:
        raise WeightsError(f"{arch}: is not a plain ViT: its class token differs from ours by {apart:.1e} relatively")
