"""The order in which a run visits its samples: a function of seed and position, so that it can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Visit(NamedTuple):
    """A sample's turn: which one, and in which epoch."""

    sample: int
    epoch: int


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """Order (length,) in which epoch ``epoch`` visits the samples: a pure function of its arguments."""
    return np.random.default_rng((seed, epoch)).permutation(length)


class ResumableBatches(Sampler[list[Visit]]):
    """Endless batches of samples for one process, from any position on.

    The stream of all processes together is the epochs' orders laid end to end; sample number k of it is
    ``epoch_order(length, seed, k // length)[k % length]``. A step takes the next ``world · batch`` samples,
    process ``rank`` every ``world``-th of them. So the position is one number, no sample is dropped at the
    end of an epoch, and a run may go on with another number of processes.

    Args:
        length: samples in the data set.
        seed: of the order.
        batch: samples per process.
        rank: of this process.
        world: number of processes.
        position: samples that all processes together have consumed.
    """

    def __init__(
        self, length: int, seed: int, batch: int, rank: int = 0, world: int = 1, position: int = 0
    ) -> None:
        self.length, self.seed, self.batch = length, seed, batch
        self.rank, self.world, self.position = rank, world, position

    def __iter__(self) -> Iterator[list[Visit]]:
        position, size = self.position, self.batch * self.world
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            visits = []
            for number in range(position + self.rank, position + size, self.world):
                if number // self.length != epoch:
                    epoch = number // self.length
                    order = epoch_order(self.length, self.seed, epoch)
                visits.append(Visit(int(order[number % self.length]), epoch))
            yield visits
            position += size


def epochs_seen(position: int, length: int) -> int:
    """Whole passes over the data set after ``position`` samples."""
    return position // length
