"""Turn a batch of bytes into normalized floats on the device, with erased boxes."""

import torch
from torch import Tensor

from mugs.data.loading.batch import Batch, BoxNoise, Views
from mugs.data.views.config import ViewRecipe
from mugs.devices import copy_to_device


class DeviceTransform:
    """Copies a batch to the device, scales it to 0 to 1, erases and normalizes.

    The recipe says whether erasing or normalizing comes first. On a GPU all of it runs on a stream
    of its own, beside the training step that is still running there.
    """

    def __init__(self, device: torch.device, recipe: ViewRecipe) -> None:
        self.device = device
        self.recipe = recipe
        self.stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )
        self.mean = torch.tensor(recipe.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(recipe.std, device=device).view(3, 1, 1)
        if self.stream is not None:
            # mean and std were written on the current stream.
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def __call__(self, batch: Batch) -> Views:
        """Return the views, floats (crops, N, 3, size, size)."""
        if self.stream is None:
            return self._transform(batch)
        with torch.cuda.stream(self.stream):
            views = self._transform(batch)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for tensor in (views.large, views.small, *views.extras.values()):
            # The memory belongs to the copy stream. Without this, the allocator could hand it out
            # again while the training step, on the current stream, still reads it.
            tensor.record_stream(current)
        return views

    def _transform(self, batch: Batch) -> Views:
        # One piece of memory for all crops, so that one write erases in all of them.
        values = torch.empty(batch.large.numel() + batch.small.numel(), device=self.device)
        large, small = torch.split(values, [batch.large.numel(), batch.small.numel()])
        crops = [large.view(batch.large.shape), small.view(batch.small.shape)]
        for floats, pixels in zip(crops, (batch.large, batch.small), strict=True):
            floats.copy_(copy_to_device(pixels, self.device)).div_(255)
        # The release erases before it normalizes, so its noise ends with mean -2 and standard
        # deviation 4.4 instead of 0 and 1 (M11).
        if self.recipe.erase_before_norm:
            self._erase(values, batch.noise)
        for floats in crops:
            floats.sub_(self.mean).div_(self.std)
        if not self.recipe.erase_before_norm:
            self._erase(values, batch.noise)
        extras = {name: copy_to_device(value, self.device) for name, value in batch.extras.items()}
        return Views(crops[0], crops[1], extras)

    def _erase(self, values: Tensor, noise: BoxNoise) -> None:
        if len(noise.values):
            places = copy_to_device(noise.places, self.device)
            values.index_put_((places,), copy_to_device(noise.values, self.device))
