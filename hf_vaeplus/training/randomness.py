"""Randomness as a function of (seed, progress, position in the global batch) and of nothing else.

So a resumed run is the same run bit for bit, and two processes see what one process with twice the batch sees.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


def derived_seed(*key: int) -> int:
    """A 63-bit seed that depends on the non-negative integers of `key`; a zero at the end does not count."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1  # numpy 1 shifts no uint64 by an int


class BatchNoise:
    """Standard normal noise of one forward pass: row i depends on (seed, pass, position in the global batch) alone."""

    def __init__(self, seed: int, forward_pass: int, batch_size: int, rank: int, world_size: int, device):
        self._generator = torch.Generator(device).manual_seed(derived_seed(seed, 1, forward_pass))
        self._global_batch, self._rows = batch_size * world_size, slice(rank * batch_size, (rank + 1) * batch_size)
        self._device = device

    def __call__(self, dim: int) -> torch.Tensor:
        """The next noise, of shape `(batch_size, dim)`."""
        noise = torch.randn(self._global_batch, dim, generator=self._generator, device=self._device)
        return noise[self._rows]


class GlobalBatchSampler(Sampler):
    """Indices of this process for the forward passes `first` to `last`, without end of epoch and without remainder.

    Pass t takes positions `t * world_size * batch_size` onwards of one endless sequence: permutation after permutation
    of the data set, permutation e drawn from (seed, e).
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, rank: int, world_size: int, first: int, last: int
    ):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.first, self.last = rank, world_size, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, None
        for forward_pass in range(self.first, self.last):
            start = (forward_pass * self.world_size + self.rank) * self.batch_size
            indices = []
            while len(indices) < self.batch_size:
                wanted, offset = divmod(start + len(indices), self.num_samples)
                if wanted != epoch:
                    epoch, generator = wanted, torch.Generator().manual_seed(derived_seed(self.seed, 0, wanted))
                    order = torch.randperm(self.num_samples, generator=generator)
                indices += order[offset : offset + self.batch_size - len(indices)].tolist()
            yield indices
