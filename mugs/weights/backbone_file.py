"""Backbone files: our safetensors, and released Mugs checkpoints (.pth)."""

import argparse
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mugs.checkpoint.tensors import write_tensors
from mugs.models.config import ViTConfig
from mugs.models.vit import ViT, build_vit
from pipeline.files import replace_atomically

State = dict[str, Tensor]


class WeightsError(ValueError):
    """Weights cannot be used; the message names the file or the keys."""


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], where: object) -> None:
    """Load weights; raise WeightsError with `where` and the keys unless keys and shapes fit."""
    wanted = network.state_dict().keys()
    missing = sorted(wanted - state.keys())
    unexpected = sorted(state.keys() - wanted)
    # Checked here, because torch's own message does not name the file.
    if missing or unexpected:
        raise WeightsError(f"{where}: keys do not fit: missing {missing}, unexpected {unexpected}")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"{where}: {error}") from error


def write_backbone_file(path: Path, state: State, meta: dict[str, Any]) -> None:
    """Write backbone weights and their description as one safetensors file."""
    with replace_atomically(path) as temporary:
        write_tensors(temporary, state, {"mugs": json.dumps(meta)})


def read_backbone_file(path: Path) -> tuple[State, dict[str, Any]]:
    """Return weights and description of one of our files; raise WeightsError with its name."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["mugs"])
            return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{path}: not a backbone file of ours ({error})") from error


def load_backbone(path: Path, *, drop_path: float = 0.0) -> ViT:
    """Return the backbone in one of our files; raise WeightsError with file and keys."""
    state, meta = read_backbone_file(path)
    try:
        vit = build_vit(ViTConfig(**meta["arch"]), drop_path=drop_path)
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{path}: does not say of what shape it is") from error
    load_strictly(vit, state, path)
    return vit


def read_released_checkpoint(path: Path) -> dict[str, Any]:
    """Read a released `.pth`, full or backbone only.

    It may hold tensors, plain values and the old argument namespace, and nothing else: a pickle can
    run code.

    Raises:
        WeightsError: the file is missing, damaged or unsafe.
    """
    try:
        # weights_only refuses code; the released files hold their arguments as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: refused, it holds more than tensors and plain values: {error}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path}: damaged or not a PyTorch file: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


def extract_backbone_state(
    checkpoint: Mapping[str, Any], which: Literal["teacher", "student"] = "teacher"
) -> tuple[State, tuple[str, ...]]:
    """Return backbone weights under our names, and the keys that were left out.

    Heads and relation block are left out, as evaluations do not use them (released).
    """
    # A full checkpoint holds both networks by name; a backbone file is the state dict itself.
    nested = checkpoint.get(which)
    source: Mapping[str, Any] = nested if isinstance(nested, Mapping) else checkpoint
    source = source.get("state_dict", source)
    # DistributedDataParallel prefixes every key with "module.".
    names = {key: key.removeprefix("module.") for key in source}
    # Without such a prefix there are no heads, and every key is one of the backbone.
    prefix = "backbone." if any(n.startswith("backbone.") for n in names.values()) else ""
    kept = {
        key: name.removeprefix(prefix)
        for key, name in names.items()
        if name.startswith(prefix)
        and not name.startswith(f"{prefix}relation_blocks.")
        and torch.is_tensor(source[key])
    }
    return {n: source[k] for k, n in kept.items()}, tuple(sorted(set(source) - set(kept)))


def load_released_backbone(
    vit: ViT, path: Path, which: Literal["teacher", "student"] = "teacher"
) -> tuple[str, ...]:
    """Load a released checkpoint; return the keys left out.

    Raise WeightsError if the rest differs.
    """
    state, discarded = extract_backbone_state(read_released_checkpoint(path), which)
    load_strictly(vit, state, path)
    return discarded
