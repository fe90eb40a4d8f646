"""Which samples make up which batch: a permutation per epoch, cut by step and rank."""

import numpy as np
from numpy.random import Generator, Philox


class Order:
    """Permutation keyed by (seed, epoch); the batch of a step is a slice of it, each rank's part a slice of that.

    An incomplete last batch is dropped, unless `steps_per_epoch` asks for it: then the permutation is repeated from its
    start. (The released sampler pads so that 1,271 batches of 1,008 come out of 1,281,167 images.)
    """

    def __init__(
        self, num: int, *, seed: int, world: int, rank: int, batch_size: int, steps_per_epoch: int | None = None
    ) -> None:
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} does not divide over {world} ranks")
        if num == 0:
            raise ValueError("the data set holds no image")
        self.num, self.seed, self.batch_size = num, seed, batch_size
        self.share, self.rank = batch_size // world, rank
        self.steps_per_epoch = num // batch_size if steps_per_epoch is None else steps_per_epoch
        if self.steps_per_epoch < 1:
            raise ValueError(f"batch_size {batch_size} exceeds the {num} images of the data set")
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def permutation(self, epoch: int) -> np.ndarray:
        """All samples of an epoch in order, (steps_per_epoch * batch_size,)."""
        if epoch != self._epoch:
            order = Generator(Philox(key=[self.seed, epoch], counter=[0, 0, 0, 1 << 32])).permutation(self.num)
            self._epoch, self._order = epoch, np.resize(order, self.steps_per_epoch * self.batch_size)
        return self._order

    def indices(self, step: int) -> np.ndarray:
        """This rank's samples of global step `step`, (batch_size / world,)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.batch_size + self.rank * self.share
        return self.permutation(epoch)[first : first + self.share]
