"""Precision of the arithmetic in training and evaluation."""

from contextlib import AbstractContextManager, nullcontext

import torch


def allow_tf32(device: torch.device) -> None:
    """Allow TF32 in fp32 matrix products on a GPU for the rest of the process, as released."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return mixed precision if `precision` is "bf16", else a context that does nothing."""
    # bf16 has the exponent range of fp32, so the loss needs no scaling.
    return (
        torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
    )
