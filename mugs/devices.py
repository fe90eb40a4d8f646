"""Copies to the device that the host does not wait for."""

from functools import lru_cache

import torch
from torch import Tensor


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device, as an asynchronous copy where that is a GPU.

    From pageable memory the host would wait until the GPU has done all that was asked of it before.
    torch keeps page-locked memory for reuse and hands it out again after the copy only.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=64)
def make_constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the values on a device, copied there once; the tensor must not be changed."""
    return copy_to_device(torch.tensor(values, dtype=dtype), device)
