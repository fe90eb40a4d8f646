"""Backbone files: our safetensors, and released Mugs checkpoints (.pth)."""

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mugs.checkpoint.tensors import check_header_length, write_tensors
from mugs.models.config import ViTConfig
from mugs.models.vit import ViT, build_sincos_positions, build_vit
from mugs.weights.pickle_file import WeightsError, read_released_checkpoint
from pipeline.files import replace_atomically

State = dict[str, Tensor]
# Bytes. A full checkpoint of a ViT-L has 5 GB.
LARGEST_FILE = 32 << 30

# Whose weights a file holds, by a piece of a key that only they have.
KEY_SIGNS = {
    "encoder.layer.": "Hugging Face transformers",
    "encoder_layer_": "torchvision",
    "resblocks.": "CLIP",
    "backbone.layers.": "OpenMMLab",
    "decoder_blocks.": "MAE",
    "ls1.gamma": "DINOv2 (with LayerScale)",
    "layer1.0.conv1.": "a ResNet",
}


# Methods that keep both encoders in one state dict name them so (MoCo-v3, MGC).
ENCODERS = {"teacher": "momentum_encoder.", "student": "base_encoder."}
# Part of a key that only full checkpoints of this method have, and the heads of its ViT-S.
HEADS_OF_VIT_S = {"projector_patch.": ("MGC", 8), "_encoder.head.": ("MoCo-v3", 12)}


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], where: object) -> None:
    """Load weights; raise WeightsError with `where` and keys unless all keys and shapes fit."""
    own = network.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{key} is {list(state[key].shape)} and not {list(tensor.shape)}"
        for key, tensor in own.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if not (missing or unexpected or shapes):
        check_values(state, own, where)
        network.load_state_dict(state)
        return
    # Checked here, because torch's own message names no file and all keys in one line.
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    found = [f"{len(keys)} {kind} ({shorten(keys)})" for kind, keys in kinds.items() if keys]
    signs = (name for sign, name in KEY_SIGNS.items() if any(sign in key for key in unexpected))
    whose = next((f"; they look like weights of {name}" for name in signs), "")
    details = [f"{kind}: {key}" for kind, keys in kinds.items() for key in keys]
    message = f"{where}: keys do not fit: {', '.join(found)}{whose}"
    raise WeightsError(message, "\n".join(details))


def check_values(state: Mapping[str, Tensor], own: Mapping[str, Tensor], where: object) -> None:
    """Raise WeightsError for tensors that torch would convert, or whose values are no weights."""
    problems: dict[str, list[str]] = {}
    for key, tensor in state.items():
        problem = ""
        if tensor.is_meta or tensor.layout != torch.strided:
            problem = "without plain values (sparse, or on the meta device)"
        elif tensor.is_floating_point() != own[key].is_floating_point():
            # Of quantized weights; the factors that belong to them are elsewhere.
            problem = f"of {str(tensor.dtype).removeprefix('torch.')} instead of floating point"
        elif not torch.isfinite(tensor).all():
            problem = "with values that are infinite or not a number"
        if problem:
            problems.setdefault(problem, []).append(key)
    if problems:
        found = [f"{len(keys)} {problem} ({shorten(keys)})" for problem, keys in problems.items()]
        raise WeightsError(f"{where}: weights cannot be used: {', '.join(found)}")


def shorten(keys: list[str]) -> str:
    """Return three kinds of keys, and how many more there are; numbers in a kind are `*`."""
    kinds: dict[str, list[str]] = {}
    for key in keys:
        kinds.setdefault(re.sub(r"\b\d+\b", "*", key), []).append(key)
    # A key of its own says as much as one that each block has, and is easily lost among those.
    shown = sorted(kinds, key=lambda kind: len(kinds[kind]))[:3]
    names = [kind if len(kinds[kind]) > 1 else kinds[kind][0] for kind in shown]
    more = len(keys) - sum(len(kinds[kind]) for kind in shown)
    return ", ".join(names) + (f" and {more} more" if more else "")


def write_backbone_file(path: Path, state: State, meta: dict[str, Any]) -> None:
    """Write backbone weights and their description as one safetensors file."""
    with replace_atomically(path) as temporary:
        write_tensors(temporary, state, {"mugs": json.dumps(meta)})


def read_backbone_file(path: Path) -> tuple[State, dict[str, Any]]:
    """Return weights and description of one of our files; raise WeightsError with its name."""
    try:
        check_header_length(path)
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"more than {LARGEST_FILE >> 30} GB")
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["mugs"])
            return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not a backbone file of ours ({error})") from error


def load_backbone(path: Path, *, drop_path: float = 0.0) -> ViT:
    """Return the backbone in one of our files; raise WeightsError with file and keys."""
    state, meta = read_backbone_file(path)
    try:
        config = ViTConfig(**meta["arch"])
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{path}: does not say of what shape it is") from error
    check_described_shape(config, state, path)
    vit = build_vit(config, drop_path=drop_path)
    load_strictly(vit, state, path)
    return vit


def check_described_shape(config: ViTConfig, state: State, path: Path) -> None:
    """Check that a file's tensors have the shape that it says, before that is built.

    A text of 200 bytes can ask for a million blocks. How tensors fit one by one is not checked.

    Raises:
        WeightsError: the shape is none, or another one.
    """
    sizes = (config.embed_dim, config.depth, config.num_heads, config.patch_size, config.image_size)
    # `True` is an int for Python.
    if not all(type(size) is int and size > 0 for size in sizes):
        raise WeightsError(f"{path}: says that it is of no possible shape, {config}")
    side = config.image_size // config.patch_size
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    if len(blocks) != config.depth:
        raise WeightsError(f"{path}: says depth {config.depth}, but has {len(blocks)} blocks")
    shapes = {
        "pos_embed": [1, 1 + side**2, config.embed_dim],
        "patch_embed.proj.weight": [config.embed_dim, 3, config.patch_size, config.patch_size],
    }
    for key, shape in shapes.items():
        found = list(state[key].shape) if key in state else "missing"
        if found != shape:
            raise WeightsError(f"{path}: by what it says, {key} is {shape}, but it is {found}")
    if config.embed_dim % config.num_heads or config.positions not in ("learned", "sincos"):
        raise WeightsError(f"{path}: says that it is of no possible shape, {config}")


def extract_backbone_state(
    checkpoint: Mapping[str, Any], which: Literal["teacher", "student"] = "teacher"
) -> tuple[State, tuple[str, ...]]:
    """Return backbone weights under our names, and the keys that were left out.

    Heads and relation block are left out, as evaluations do not use them (released).

    Raises:
        WeightsError: the file has the other network only.
    """
    # A full checkpoint holds both networks by name; a backbone file is the state dict itself.
    networks = [
        name for name in ("teacher", "student") if isinstance(checkpoint.get(name), Mapping)
    ]
    if networks and which not in networks:
        raise WeightsError(f"has no {which}, only a {networks[0]}; ask for network {networks[0]}")
    source: Mapping[str, Any] = checkpoint[which] if networks else checkpoint
    for wrapper in ("state_dict", "model"):
        if isinstance(source.get(wrapper), Mapping):
            if isinstance(source.get(f"{wrapper}_ema"), Mapping):
                raise WeightsError(
                    f"holds two networks, {wrapper} and {wrapper}_ema, their average over time; "
                    "save the one to evaluate in a file of its own"
                )
            source = source[wrapper]
    names = {key: remove_wrappers(key) for key in source}
    prefix, others = _find_backbone_prefix(names.values(), which)
    kept = {
        key: name.removeprefix(prefix)
        for key, name in names.items()
        if name.startswith(prefix)
        and not name.removeprefix(prefix).startswith(others)
        and torch.is_tensor(source[key])
    }
    return {n: source[k] for k, n in kept.items()}, tuple(sorted(set(source) - set(kept)))


def _find_backbone_prefix(
    names: Collection[str], which: Literal["teacher", "student"]
) -> tuple[str, tuple[str, ...]]:
    """Return what backbone keys begin with, and after it those of layers that are left out."""
    # The mask vector of a released iBOT student is no part of the backbone either.
    ours = ("relation_blocks.", "masked_embed")

    def some(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if some("backbone."):
        return "backbone.", ours
    there = [network for network, prefix in ENCODERS.items() if some(prefix)]
    if there and which not in there:
        raise WeightsError(f"has no {which}, only a {there[0]}; ask for network {there[0]}")
    if there:
        return ENCODERS[which], ("head.",)
    # Without such a prefix there are no heads, and every key is one of the backbone.
    return "", ours


def check_positions(state: Mapping[str, Tensor], config: ViTConfig, where: object) -> None:
    """Raise WeightsError if positions are fixed in a file and learned in the network, or reversed.

    Weights say nothing of the number of heads: those of a ViT with 8 heads load into one with 6
    without an error, and give other features. Their kind of positions tells them apart.
    """
    table = state["pos_embed"]
    side = math.isqrt(table.shape[1] - 1)
    fixed = table.shape[1] == 1 + side**2 and torch.allclose(
        table.float(), build_sincos_positions(side, table.shape[2]), atol=1e-4
    )
    if fixed != (config.positions == "sincos"):
        kinds = ("fixed sines and cosines", "learned")
        found, expected = kinds if fixed else reversed(kinds)
        raise WeightsError(
            f"{where}: its positions are {found}, those of the architecture {expected}, so it is "
            "of another one, perhaps with another number of heads; "
            "MGC's ViT-S is vit_s16_h8, MoCo-v3's is vit_s16_h12"
        )


def check_heads(left_out: Collection[str], config: ViTConfig, where: object) -> None:
    """Raise WeightsError if keys beside the backbone tell that its ViT-S has other heads.

    Those of 8 heads load into 12 as well, and there the positions are of the same kind.
    """
    for part, (method, heads) in HEADS_OF_VIT_S.items():
        is_of_method = any(part in key for key in left_out)
        if is_of_method and config.embed_dim == 384 and config.num_heads != heads:
            raise WeightsError(
                f"{where}: its keys are those of {method}, whose ViT-S has {heads} heads, and the "
                f"architecture has {config.num_heads}; set arch to vit_s16_h{heads}"
            )


def remove_wrappers(key: str) -> str:
    """Return a key without what DistributedDataParallel and torch.compile put before it."""
    parts = key.split(".")
    while parts[0] in ("module", "_orig_mod"):
        del parts[0]
    return ".".join(parts)


def load_released_backbone(
    vit: ViT, path: Path, which: Literal["teacher", "student"] = "teacher"
) -> tuple[str, ...]:
    """Load a released checkpoint; return the keys left out.

    Raise WeightsError if the rest differs.
    """
    checkpoint = read_released_checkpoint(path)
    try:
        state, discarded = extract_backbone_state(checkpoint, which)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    load_strictly(vit, state, path)
    check_positions(state, vit.config, path)
    check_heads(discarded, vit.config, path)
    return discarded
