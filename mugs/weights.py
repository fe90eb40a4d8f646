"""Weights on disk: our exported backbones (safetensors) and the released Mugs checkpoints (.pth)."""

import argparse
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mugs.atomic import replacing
from mugs.backbones.vit import ViT
from mugs.methods.mugs import Mugs
from mugs.storage.tensors import write_tensors

State = dict[str, Tensor]


class WeightsError(ValueError):
    """Weights cannot be used; the message names the file or the keys."""


@dataclass(frozen=True)
class KeyReport:
    """Keys the network lacks in the file, keys of the file nobody asked for, keys left out on purpose."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    discarded: tuple[str, ...]

    def check(self) -> None:
        """Raise WeightsError unless every key of the network was found and every key of the file is accounted for."""
        if self.missing or self.unexpected:
            raise WeightsError(f"keys do not fit: missing {list(self.missing)}, unexpected {list(self.unexpected)}")


def save_backbone(path: Path, state: State, meta: dict[str, Any]) -> None:
    """Write backbone weights and their description as one safetensors file."""
    with replacing(path) as temporary:
        write_tensors(temporary, state, {"mugs": json.dumps(meta)})


def load_backbone(path: Path) -> tuple[State, dict[str, Any]]:
    """Weights and description written by `save_backbone`. Raises WeightsError naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["mugs"])
            return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{path}: not a backbone file of ours ({error})") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A released `.pth`, full or backbone only. Tensors and the old argument namespace are all it may hold.

    Raises WeightsError for a missing, damaged or unsafe file.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: refused, it holds more than tensors and plain values: {error}") from error
    except (RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path}: damaged or not a PyTorch file: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


def backbone_state(
    checkpoint: Mapping[str, Any], which: Literal["teacher", "student"] = "teacher"
) -> tuple[State, tuple[str, ...]]:
    """Backbone weights of a full or backbone-only checkpoint under our names, and the keys that were left out.

    Left out: heads and the relation block, which evaluations do not use (released code).
    """
    full = isinstance(checkpoint.get(which), Mapping)
    source: Mapping[str, Any] = checkpoint[which] if full else checkpoint
    source = source.get("state_dict", source)
    names = {key: key.removeprefix("module.") for key in source}
    if any(name.startswith("backbone.") for name in names.values()):
        kept = {k: n.removeprefix("backbone.") for k, n in names.items() if n.startswith("backbone.")}
    else:
        kept = names
    kept = {k: n for k, n in kept.items() if not n.startswith("relation_blocks.") and torch.is_tensor(source[k])}
    return {n: source[k] for k, n in kept.items()}, tuple(sorted(set(source) - set(kept)))


def load_released_backbone(vit: ViT, path: Path, which: Literal["teacher", "student"] = "teacher") -> KeyReport:
    """Load a released checkpoint into a backbone; raises WeightsError, and loads nothing, unless all keys fit."""
    state, discarded = backbone_state(read_checkpoint(path), which)
    wanted = {k for k in vit.state_dict() if not k.startswith("relation_blocks.")}
    report = KeyReport(tuple(sorted(wanted - set(state))), tuple(sorted(set(state) - wanted)), discarded)
    try:
        report.check()
        vit.load_state_dict(state, strict=False)
    except (WeightsError, RuntimeError) as error:
        raise WeightsError(f"{path}: {error}") from error
    return report


def load_full_state(method: Mugs, checkpoint: Mapping[str, Any]) -> None:
    """Networks, queues, memories and centre of a released full checkpoint, strictly.

    Of the three tables of a released memory the first is compared and the second handed out; the third is unused.
    """
    student = {k.removeprefix("module."): v for k, v in checkpoint["student"].items()}
    method.student.load_state_dict(student)
    method.teacher.load_state_dict(checkpoint["teacher"])
    state = method.extra_state
    extra: State = {"center": checkpoint["group-sup."]["center"][0]}
    for ours, theirs in (("instance_queue", "instance-sup."), ("local_group_queue", "local-group-sup.")):
        extra[f"{ours}.rows"] = checkpoint[theirs]["queue"].T
        extra[f"{ours}.pointer"] = checkpoint[theirs]["queue_ptr"][0]
    for ours, theirs in (("student_memory", "student_mem"), ("teacher_memory", "teacher_mem")):
        extra[f"{ours}.compare"] = checkpoint[theirs]["block.queue_q"]
        if f"{ours}.separate" in state.state_dict():
            extra[f"{ours}.separate"] = checkpoint[theirs]["block.queue_k"]
        extra[f"{ours}.pointer"] = checkpoint[theirs]["block.queue_ptr"][0]
    state.load_state_dict(extra)
