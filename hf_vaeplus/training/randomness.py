"""Randomness as a function of (seed, progress, position in the global batch) and of nothing else.

So a resumed run is the same run bit for bit, and two processes see what one process with twice the batch sees.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


def derived_seed(*key: int) -> int:
    """A 63-bit seed that depends on the non-negative integers of `key`; a zero at the end does not count."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1  # numpy 1 shifts no uint64 by an int


class Noise:
    """Standard normal noise of a run: row i of a step depends on (seed, step, i, number of rows of a step) alone.

    Rows are counted over the whole step, all its passes and processes: pass after pass, process after process. Noise
    is drawn where it is used and for many steps at once, since a generator costs the host more than a kernel.

    Args:
        seed: of the run.
        num_rows: of one step of the optimizer.
        device: where the noise is drawn. Another kind of device draws other noise.
    """

    _most_steps, _most_values = 64, 2**20  # of a block; with other numbers no old run could be repeated

    def __init__(self, seed: int, num_rows: int, device: torch.device):
        self.seed, self.num_rows, self.device = seed, num_rows, device
        self._blocks = {}  # (draw of the step, dim) -> number of the block and its noise

    def at(self, step: int, rows: slice) -> "BatchNoise":
        """The noise of some rows of a step."""
        return BatchNoise(self, step, rows)

    def draw(self, number: int, dim: int, step: int) -> torch.Tensor:
        """All rows of a step, `(num_rows, dim)`, of its draw `number`."""
        num_steps = max(1, min(self._most_steps, self._most_values // (self.num_rows * dim)))
        wanted, place = divmod(step, num_steps)
        block, noise = self._blocks.get((number, dim), (None, None))
        if block != wanted:
            generator = torch.Generator(self.device).manual_seed(derived_seed(self.seed, 1, wanted, number))
            noise = torch.randn(num_steps, self.num_rows, dim, generator=generator, device=self.device)
            self._blocks[number, dim] = wanted, noise
        return noise[place]


class BatchNoise:
    """The noise of one forward pass, see [`Noise`]."""

    def __init__(self, source: Noise, step: int, rows: slice):
        self._source, self._step, self._rows, self._numbers = source, step, rows, itertools.count()

    def __call__(self, dim: int) -> torch.Tensor:
        """The next noise, of shape `(batch_size, dim)`."""
        return self._source.draw(next(self._numbers), dim, self._step)[self._rows]


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
