"""What the device does: copies that the host does not wait for, and repeatable kernels."""

import os
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


def use_deterministic_algorithms() -> None:
    """Let torch choose kernels that give the same bits every time, or fail where there is none.

    It holds for the rest of the process, and must come before the first product on the GPU.
    """
    # cuBLAS repeats its results only with a workspace of fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
