"""The packed weights of a schedule's subnetworks; the next timestep's are prepared beside the current one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np
import torch

from dydit.adapters.base import AttentionParts, MlpParts
from dydit.export.schedule import SubnetSchedule
from dydit.runtime.packing import (
    PackCache,
    PackedBlock,
    PackStatistics,
    block_bytes,
    check_budget,
    pack_block,
    packed_bytes,
)


class SchedulePacks:
    """Packed blocks by timestep, made when they are first asked for.

    Args:
        weights: attention and MLP of each block.
        schedule: which heads and groups are on.
        budget: bytes of copies to keep; None = one more copy of the block weights.

    Raises:
        ConfigError: the budget is smaller than one block.
    """

    def __init__(
        self,
        weights: Sequence[tuple[AttentionParts, MlpParts]],
        schedule: SubnetSchedule,
        budget: int | None = None,
    ) -> None:
        sizes = [block_bytes(*parts) for parts in weights]
        budget = sum(sizes) if budget is None else budget
        check_budget(budget, max(sizes))
        self._weights, self._schedule, self._cache = weights, schedule, PackCache(budget)
        self._side: torch.cuda.Stream | None = None

    def get(self, position: int, block: int) -> PackedBlock:
        """A block's slices for the schedule's timestep at ``position``."""
        row = int(self._schedule.rows[position, block])
        return self._cache.get((block, row), self._sizes[block, row], partial(self._make, block, row))

    def clear(self) -> None:
        """Forget every packing, when the weights have moved."""
        self._cache.clear()

    def statistics(self) -> PackStatistics:
        """See ``PackCache.statistics``."""
        return self._cache.statistics()

    @cached_property
    def all_fit(self) -> bool:
        """Whether the whole schedule's slices fit the budget: none is then ever dropped."""
        return sum(self._sizes.values()) <= self._cache.budget

    def prepare_next(self, position: int, device: torch.device) -> None:
        """Make the slices of the timestep after ``position``, on a GPU beside what it is computing.

        On the CPU there is nothing beside. Nor is it done where two timesteps' slices do not fit the budget:
        it would push out what is still needed.
        """
        if device.type != "cuda" or position + 1 == len(self._schedule.timesteps):
            return
        if self._size_at(position) + self._size_at(position + 1) > self._cache.budget:
            return
        if self._side is None:
            self._side = torch.cuda.Stream(device)
        with torch.cuda.stream(self._side):
            for block in range(len(self._weights)):
                self.get(position + 1, block)

    def join(self, device: torch.device) -> None:
        """Let what is computed from here on wait for the slices that were made beside."""
        if self._side is not None:
            torch.cuda.current_stream(device).wait_stream(self._side)

    def _make(self, block: int, row: int) -> PackedBlock:
        packed = pack_block(*self._weights[block], *self._masks(row))
        if self._side is not None and packed.copied_bytes:
            # Made on either stream, read on the main one: its memory must not go to others before.
            for tensor in packed.tensors():
                tensor.record_stream(torch.cuda.default_stream(tensor.device))
        return packed

    def _size_at(self, position: int) -> int:
        return sum(self._sizes[key] for key in enumerate(self._schedule.rows[position].tolist()))

    @cached_property
    def _sizes(self) -> dict[tuple[int, int], int]:
        """Bytes of copies of every packing (block, row) of the schedule."""
        rows = self._schedule.rows.T.tolist()
        keys = [(block, row) for block, steps in enumerate(rows) for row in set(steps)]
        return {(block, row): packed_bytes(*self._weights[block], *self._masks(row)) for block, row in keys}

    def _masks(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return self._schedule.head_rows[row], self._schedule.group_rows[row]
