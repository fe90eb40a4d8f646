"""A copy of a state in main memory, so that training continues while it is written."""

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopy:
    """Reusable buffers for one copy of a state; page-locked if the state is on a GPU."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, str], Tensor] = {}

    def copy_from(self, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copy tensors by file and name over the previous copy; return when it is complete."""
        sources = {
            (part, name): tensor
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }
        self.buffers = {key: self._buffer(key, tensor) for key, tensor in sources.items()}
        for key, tensor in sources.items():
            self.buffers[key].copy_(tensor.detach(), non_blocking=True)
        # The copies run side by side; the next step may change the tensors only after all are done.
        for device in {tensor.device for tensor in sources.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return {
            part: {name: self.buffers[part, name] for name in tensors}
            for part, tensors in parts.items()
        }

    def _buffer(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        # Page-locked memory is slow to allocate, so a buffer that fits is kept.
        old = self.buffers.get(key)
        if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            return old
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
