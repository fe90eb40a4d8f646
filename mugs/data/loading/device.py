"""Turn a batch of bytes into normalized floats on the device, with erased boxes.

The noise of an erased box is a hash of (seed, epoch, sample, crop, pixel), turned into N(0, 1). So
it is the same on every device, for every batch size and number of ranks.
"""

import torch
from torch import Tensor

from mugs.data.loading.batch import Batch, Views
from mugs.data.views.config import ViewRecipe
from mugs.data.views.plan import FIRST_SMALL_CROP
from mugs.random_streams import derive_erase_key, hashed_normal, make_image_key


class DeviceTransform:
    """Copies a batch to the device, scales it to 0 to 1, erases and normalizes.

    The recipe says whether erasing or normalizing comes first. On a GPU all of it runs on a stream
    of its own, beside the training step that is still running there.
    """

    def __init__(self, device: torch.device, recipe: ViewRecipe, seed: int) -> None:
        self.device = device
        self.recipe = recipe
        self.seed = seed
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
        groups = []
        first = 0
        for pixels, number in ((batch.large, 0), (batch.small, FIRST_SMALL_CROP)):
            crops = self._copy(pixels).float().div_(255)
            # The release erases before it normalizes, so its noise ends with mean -2 and standard
            # deviation 4.4 instead of 0 and 1 (M11).
            if not self.recipe.erase_before_norm:
                self._normalize(crops)
            self._erase(crops, batch, first, number)
            if self.recipe.erase_before_norm:
                self._normalize(crops)
            groups.append(crops)
            first += len(pixels)
        extras = {name: self._copy(value) for name, value in batch.extras.items()}
        return Views(groups[0], groups[1], extras)

    def _copy(self, tensor: Tensor) -> Tensor:
        """Copy to the device; to a GPU from page-locked memory, so that the host does not wait."""
        if self.stream is None:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _normalize(self, crops: Tensor) -> None:
        crops.sub_(self.mean).div_(self.std)

    def _erase(self, crops: Tensor, batch: Batch, first: int, number: int) -> None:
        """Fill the boxes of crops first, first + 1, ... with noise.

        The crops are number, number + 1, ... in random streams.
        """
        boxes = batch.erase[first : first + len(crops)]
        # boxes and ids are on the CPU, so reading them does not wait for the device.
        for crop, image in (boxes[..., 2] > 0).nonzero().tolist():
            x, y, w, h = boxes[crop, image].tolist()
            image_key = make_image_key(self.seed, batch.epoch, int(batch.ids[image]))
            key = derive_erase_key(image_key, number + crop)
            crops[crop, image, :, y : y + h, x : x + w] = hashed_normal(key, (3, h, w), self.device)
