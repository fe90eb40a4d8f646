"""Precision of the arithmetic in training and evaluation."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return mixed precision if `precision` is "bf16", else a context that does nothing."""
    # bf16 has the exponent range of fp32, so the loss needs no scaling.
    return (
        torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
    )
