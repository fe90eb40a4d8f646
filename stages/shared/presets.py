"""What the paper says where it and the released code differ, as fields of the pretraining stage.

Only what the paper states: predictor initialisation, erasing before or after normalising, repeated RandAugment
operations and learning rates are not in it (or lost), and stay as released.
"""

from collections.abc import Mapping
from typing import Any

MUGS: dict[str, Any] = {
    "relation_depth": 2,  # M7
    "memories": "shared",  # M9
    "memory_pointer": "fifo",  # M1: "first-in first-out"
    "memory_start": "common",  # M33
    "local_group_token": "paper",  # M3
    "pair_average": "uniform",  # M8
}
VIEWS: dict[str, Any] = {"student_coin": "per_image"}
BY_ARCH: dict[str, dict[str, Any]] = {
    "vit_s16": {
        "batch_size": 1024,
        "weight_decay": (0.1, 0.1),
        "clip": ((0, 3.0),),
        "mugs": {"drop_path": 0.1},
    },
    "vit_b16": {
        "batch_size": 1024,
        "weight_decay": (0.1, 0.1),
        "clip": ((0, 3.0),),
        "mugs": {"drop_path": 0.2},
    },
    "vit_l16": {
        "batch_size": 640,
        "weight_decay": (0.08, 0.08),
        "clip": ((0, 0.3),),
        "mugs": {"drop_path": 0.4},
    },
}


def paper(arch: str) -> dict[str, Any]:
    """The paper's fields for an architecture; one that is not in it gets those that depend on none."""
    own = BY_ARCH.get(arch, {})
    return {**own, "mugs": {**MUGS, **own.get("mugs", {})}, "views": VIEWS}


def filled(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, and of `defaults` what it leaves out or sets to None, at every depth; what is no mapping stays."""
    result = dict(given)
    for name, value in defaults.items():
        here = result.get(name)
        if isinstance(value, Mapping):
            if here is None or isinstance(here, Mapping):
                result[name] = filled(here or {}, value)
        elif here is None:
            result[name] = value
    return result
