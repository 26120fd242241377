"""Images straight from their source, without a cache: a stream that can resume at any batch."""

import itertools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .options import ImageOptions, image_options
from .sources import cache_folder, decoded_blocks, nothing_left, open_source, warn_of_left_out


def stream_images(
    dataset_name: str | None = None, *, seed: int = 0, shuffle_buffer: int = 1000, **options
) -> "ImageStream":
    """Train straight from a source, without a cache: the options and errors of `load_images`, and those below.

    Args:
        seed (`int`): seed of the shuffling and of the mirror images, at least 0.
        shuffle_buffer (`int`): number of encoded images that are shuffled among each other, at least 1 (no shuffling).
    Returns:
        [`ImageStream`].
    """
    return open_stream(image_options(dataset_name, **options), None, seed, shuffle_buffer)


def open_stream(
    options: ImageOptions, cache_dir: str | os.PathLike | None = None, seed: int = 0, shuffle_buffer: int = 1000
) -> "ImageStream":
    """The stream of the images of `options`; arguments and errors of `stream_images`."""
    if seed < 0 or shuffle_buffer < 1:
        raise ValueError(f"expected seed >= 0 and shuffle_buffer >= 1, got {seed} and {shuffle_buffer}")
    if "[" in options.split:
        raise ValueError(
            f"a stream takes no slice of a split, got split={options.split!r}; name the split, or do not stream"
        )
    if options.holdout != 0:
        raise ValueError(
            f"a stream holds no images out, got holdout={options.holdout}; leave it out, or do not stream"
        )
    source, fingerprint = open_source(options, cache_folder(cache_dir))
    return ImageStream(source, options.max_train_samples, fingerprint, options.random_flip, seed, shuffle_buffer)


class _Sample(NamedTuple):
    label: str
    content: object
    mirrored: bool
    epoch: int


class _Ahead:
    """An iterator that can be looked into without moving on."""

    def __init__(self, items):
        self._items, self._seen = items, deque()

    def __iter__(self):
        return self

    def __next__(self):
        return self._seen.popleft() if self._seen else next(self._items)

    def peek(self):
        for place in itertools.count():
            if place == len(self._seen):
                self._seen.append(next(self._items))
            yield self._seen[place]


class ImageStream(IterableDataset):
    """Endless batches in the form of [`ImageDataset`], where `index` is the position in the stream.

    Pass e over the source is shuffled by (seed, e). Global batch t holds samples t * batch_size * world_size and on;
    rank r decodes and yields its rows r * batch_size to (r + 1) * batch_size. Iterating from batch t yields what an
    uninterrupted run yields there, since skipping reads the source without decoding. With a `DataLoader` pass
    `batch_size=None` and at most one worker: decoding uses threads, and `datasets` would split the rows among workers.

    In place of a picture that is left out comes the next one that can be used: all others keep their places.
    """

    def __init__(self, source, max_samples, fingerprint, random_flip, seed, shuffle_buffer):
        self.source, self.max_samples, self.fingerprint = source, max_samples, fingerprint
        self.random_flip, self.seed, self.shuffle_buffer = random_flip, seed, shuffle_buffer
        self.resolution, self.num_channels, self.name = source.resolution, source.num_channels, source.name
        self.first_batch, self._left_out = None, {}  # labels, in the order in which they were met

    def set_position(self, first_batch, batch_size, rank=0, world_size=1):
        """Choose where the next iteration starts, in batches since the start of training, and what this rank reads.

        Raises:
            ValueError: unless first_batch >= 0, batch_size >= 1 and 0 <= rank < world_size.
        """
        if first_batch < 0 or batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                "expected first_batch >= 0, batch_size >= 1 and 0 <= rank < world_size, "
                f"got {first_batch}, {batch_size}, {rank} and {world_size}"
            )
        self.first_batch, self.batch_size, self.rank, self.world_size = first_batch, batch_size, rank, world_size

    def __iter__(self):
        if self.first_batch is None:
            raise ValueError("the stream has no position, expected a batch size; call set_position first")
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"a stream takes at most one DataLoader worker, got {worker.num_workers}; set num_workers=1"
            )
        position, samples = 0, _Ahead(self._samples())
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for batch in itertools.count(self.first_batch):
                start = (batch * self.world_size + self.rank) * self.batch_size
                rows = list(itertools.islice(samples, start - position, start - position + self.batch_size))
                position = start + self.batch_size
                images = list(pool.map(self._decoded, rows))
                for place in reversed(range(len(rows))):
                    if images[place] is None:
                        self._leave_out(rows[place].label)
                        if place + 1 < len(rows):
                            rows[place], images[place] = rows[place + 1], images[place + 1]
                        else:
                            rows[place], images[place] = self._next_usable(rows[place], samples)
                images, mirrored = np.stack(images), np.array([row.mirrored for row in rows])
                images[mirrored] = images[mirrored, :, ::-1]
                yield {
                    "pixel_values": torch.from_numpy(images).permute(0, 3, 1, 2),
                    "index": torch.arange(start, position),
                }

    def _decoded(self, row):
        return self.source.decode_usable([(row.label, row.content)])[0]

    def _next_usable(self, bad, samples):
        """The first sample to come, and its image, that can take the place of the sample `bad`."""
        for row in samples.peek():
            if row.epoch > bad.epoch + 1:  # a whole pass has been tried
                raise nothing_left(self.name, self._left_out)
            image = self._decoded(row)
            if image is not None:
                return row, image
            self._leave_out(row.label)

    def _leave_out(self, label):
        if label not in self._left_out:
            self._left_out[label] = None
            if len(self._left_out).bit_count() == 1:  # a stream has no end: told at 1, 2, 4, 8, ...
                warn_of_left_out(self.name, list(self._left_out))

    def in_order(self, batch_size):
        """Every image of one pass over the source, neither shuffled nor mirrored, as [`ImageDataset.in_order`]."""
        rows, left_out, is_empty = itertools.islice(self.source.rows(), self.max_samples), [], True
        for images, numbers, bad in decoded_blocks(self.source, rows, batch_size):
            left_out += [label for _, label in bad]
            if numbers:
                is_empty = False
                yield {"pixel_values": torch.from_numpy(images).permute(0, 3, 1, 2), "index": torch.tensor(numbers)}
        if is_empty:
            raise nothing_left(self.name, left_out)
        warn_of_left_out(self.name, left_out)

    def _samples(self):
        """Endless [`_Sample`]s, each pass over the source shuffled through a buffer."""
        for epoch in itertools.count():
            rng = np.random.default_rng([self.seed, epoch])
            buffer, is_empty = [], True
            for row in itertools.islice(self.source.rows(), self.max_samples):
                is_empty = False
                buffer.append(_Sample(*row, self.random_flip and rng.random() < 0.5, epoch))
                if len(buffer) == self.shuffle_buffer:
                    # A random row moves to the end and leaves from there.
                    i = rng.integers(len(buffer))
                    buffer[i], buffer[-1] = buffer[-1], buffer[i]
                    yield buffer.pop()
            if is_empty:
                raise nothing_left(self.name, [])
            rng.shuffle(buffer)
            yield from buffer
