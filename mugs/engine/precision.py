"""How exact the arithmetic of a training or evaluation is."""

from contextlib import AbstractContextManager, nullcontext

import torch


def allow_tf32(device: torch.device) -> None:
    """TF32 in matrix products of fp32 on a GPU, as released, for the rest of the process."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision where `precision` is "bf16"."""
    return (
        torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
    )
