"""Batch of bytes -> normalised floats on the device, erasing included.

The noise of an erased box is a hash of (seed, epoch, sample, crop, pixel), turned into N(0, 1): the same on every
device, for every batch size and number of ranks.
"""

import torch
from torch import Tensor

from mugs.data.loading.batch import Batch, Views
from mugs.data.views.config import ViewRecipe
from mugs.random_streams import derive_erase_key, hashed_normal, make_image_key


class DeviceTransform:
    """Copies a batch to the device, scales to [0, 1], erases and normalises (in the order the recipe says).

    On a GPU all of it runs on a stream of its own, beside the step before, which the host has only queued.
    """

    def __init__(self, device: torch.device, recipe: ViewRecipe, seed: int) -> None:
        self.device, self.recipe, self.seed = device, recipe, seed
        cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self.mean = torch.tensor(recipe.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(recipe.std, device=device).view(3, 1, 1)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def __call__(self, batch: Batch) -> Views:
        """Views of N images; floats (crops, N, 3, size, size)."""
        if self.stream is None:
            return self._views(batch)
        with torch.cuda.stream(self.stream):
            views = self._views(batch)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self.stream)
        for tensor in (views.large, views.small, views.weak):
            tensor.record_stream(
                now
            )  # its memory is used again only when the step is through with it
        return views

    def _views(self, batch: Batch) -> Views:
        groups, first = [], 0
        for pixels in (batch.large, batch.small):
            crops = self._copy(pixels).float().div_(255)
            boxes = batch.erase[first : first + len(pixels)]
            if not self.recipe.erase_before_norm:
                crops = self._normalise(crops)
            self._erase(crops, boxes, batch, first)
            groups.append(self._normalise(crops) if self.recipe.erase_before_norm else crops)
            first += len(pixels)
        return Views(groups[0], groups[1], self._copy(batch.weak))

    def _copy(self, tensor: Tensor) -> Tensor:
        """To the device; from pinned memory where that is a GPU, so that the host does not wait."""
        return (
            tensor
            if self.stream is None
            else tensor.pin_memory().to(self.device, non_blocking=True)
        )

    def _normalise(self, crops: Tensor) -> Tensor:
        return crops.sub_(self.mean).div_(self.std)

    def _erase(self, crops: Tensor, boxes: Tensor, batch: Batch, first: int) -> None:
        for crop, image in (boxes[..., 2] > 0).nonzero().tolist():
            x, y, w, h = boxes[crop, image].tolist()
            image_key = make_image_key(self.seed, batch.epoch, int(batch.ids[image]))
            key = derive_erase_key(image_key, first + crop)
            noise = hashed_normal(key, (3, h, w), self.device)
            crops[crop, image, :, y : y + h, x : x + w] = noise
