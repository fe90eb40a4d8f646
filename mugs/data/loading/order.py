"""The sampler: which samples make up which batch.

One permutation per epoch, cut by step and rank.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mugs.random_streams import EpochStream, make_item_generator

# At the turn of two epochs, the loader asks for steps of the next one while the loop still asks for
# the last one, by turns. With one permutation kept, each would be drawn again and again.
EPOCHS_KEPT = 2


class SampleOrder:
    """The order of samples, a function of (seed, epoch), so that nothing has to be saved to resume.

    The batch of a step is a slice of the epoch's permutation, and each rank's part a slice of that.
    So the samples of a global batch do not depend on the number of ranks.

    An incomplete last batch is dropped, unless `steps_per_epoch` asks for it: then the permutation
    is repeated from its start. (The release pads in this way: 1,271 batches of 1,008 from 1,281,167
    images.) With `short_last` the last batch stays short; only as many samples are repeated as make
    the ranks equal.

    Raises ValueError if the ranks do not divide the batch, or the data fill no batch.
    """

    def __init__(
        self,
        num: int,
        *,
        seed: int,
        world: int,
        rank: int,
        batch_size: int,
        steps_per_epoch: int | None = None,
        short_last: bool = False,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} does not divide over {world} ranks")
        if num == 0:
            raise ValueError("the data set contains no images")
        self.num = num
        self.seed = seed
        self.world = world
        self.rank = rank
        self.batch_size = batch_size
        # -(-a // b) is a / b rounded up.
        if short_last:
            self.per_epoch = -(-num // world) * world
            self.steps_per_epoch = -(-self.per_epoch // batch_size)
        else:
            self.steps_per_epoch = num // batch_size if steps_per_epoch is None else steps_per_epoch
            self.per_epoch = self.steps_per_epoch * batch_size
        if self.steps_per_epoch < 1:
            raise ValueError(f"batch_size {batch_size} exceeds the {num} images of the data set")
        # Per object and not by a decorator, which would keep every object alive.
        self.permutation = lru_cache(EPOCHS_KEPT)(self._permutation)

    @property
    def max_images(self) -> int:
        """Return the number of this rank's samples in the largest batch."""
        return min(self.batch_size, self.per_epoch) // self.world

    def _permutation(self, epoch: int) -> np.ndarray:
        """Return all samples of an epoch in order, (per_epoch,)."""
        rng = make_item_generator(self.seed, epoch, EpochStream.SAMPLE_ORDER)
        return np.resize(rng.permutation(self.num), self.per_epoch)

    def indices(self, step: int) -> np.ndarray:
        """Return this rank's samples of a global step, (batch_size / world,) or fewer."""
        epoch, within = divmod(step, self.steps_per_epoch)
        batch = self.permutation(epoch)[within * self.batch_size : (within + 1) * self.batch_size]
        share = len(batch) // self.world
        return batch[self.rank * share : (self.rank + 1) * share]


class FixedOrder:
    """Given samples in their order, once, in batches of which the last one may be smaller."""

    def __init__(self, samples: Sequence[int] | np.ndarray, batch_size: int) -> None:
        self.samples = np.asarray(samples, dtype=np.int64)
        self.batch_size = batch_size
        self.steps_per_epoch = -(-len(self.samples) // batch_size)

    @property
    def max_images(self) -> int:
        """Return the number of samples in the largest batch."""
        return min(self.batch_size, len(self.samples))

    def indices(self, step: int) -> np.ndarray:
        """Return the samples of a step."""
        return self.samples[step * self.batch_size : (step + 1) * self.batch_size]
