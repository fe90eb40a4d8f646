"""Which samples make up which batch: a permutation per epoch, cut by step and rank."""

from functools import lru_cache

import numpy as np

from mugs.random_streams import EpochStream, make_item_generator

EPOCHS_KEPT = 2  # steps are asked for ahead of the loop and in it: at the turn of two epochs, by turns for both


class SampleOrder:
    """Permutation keyed by (seed, epoch); the batch of a step is a slice of it, each rank's part a slice of that.

    An incomplete last batch is dropped, unless `steps_per_epoch` asks for it: then the permutation is repeated from its
    start. (The released sampler pads so that 1,271 batches of 1,008 come out of 1,281,167 images.) With `short_last` it
    is kept as it is, repeating only what makes the ranks equal.
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
            raise ValueError("the data set holds no image")
        self.num, self.seed, self.batch_size = num, seed, batch_size
        self.world, self.rank = world, rank
        if short_last:
            self.per_epoch = -(-num // world) * world
            self.steps_per_epoch = -(-self.per_epoch // batch_size)
        else:
            self.steps_per_epoch = num // batch_size if steps_per_epoch is None else steps_per_epoch
            self.per_epoch = self.steps_per_epoch * batch_size
        if self.steps_per_epoch < 1:
            raise ValueError(f"batch_size {batch_size} exceeds the {num} images of the data set")
        self.permutation = lru_cache(EPOCHS_KEPT)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        """All samples of an epoch in order, (per_epoch,)."""
        rng = make_item_generator(self.seed, epoch, EpochStream.SAMPLE_ORDER)
        return np.resize(rng.permutation(self.num), self.per_epoch)

    def indices(self, step: int) -> np.ndarray:
        """This rank's samples of global step `step`, (batch_size / world,) or fewer in a short last batch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        batch = self.permutation(epoch)[within * self.batch_size : (within + 1) * self.batch_size]
        share = len(batch) // self.world
        return batch[self.rank * share : (self.rank + 1) * share]
