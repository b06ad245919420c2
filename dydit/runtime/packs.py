"""The packed weights of a schedule's subnetworks; the next timestep's are prepared beside the current one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from dydit.adapters.base import AttentionParts, MlpParts
from dydit.export.schedule import SubnetSchedule
from dydit.runtime.arena import ALIGNMENT
from dydit.runtime.cache import PackCache, arena_for, check_budget
from dydit.runtime.packing import (
    New,
    PackedAttention,
    PackedBlock,
    PackedMlp,
    attention_bytes,
    block_bytes,
    mlp_bytes,
    pack_attention,
    pack_mlp,
    tensors_of,
)

COPIES = 7  # tensors of a packing at most: weights and biases of q, k and v apart, and a weight


@dataclass(frozen=True)
class PackStatistics:
    """Counters of a schedule's blocks: one is a miss where its attention, its MLP or both had to be packed.

    Attributes:
        hits: blocks that were there.
        misses: blocks packed.
        bytes: memory that all packings take beyond the original weights.
        evictions: packings, of an attention or an MLP, dropped.
        views: blocks packed that took no memory.
    """

    hits: int
    misses: int
    bytes: int
    evictions: int
    views: int


Part = TypeVar("Part", PackedAttention, PackedMlp)


class SchedulePacks:
    """Packed blocks by timestep, made when they are first asked for.

    A block's attention and its MLP are packed apart: once per mask of heads, and once per mask of groups.

    Args:
        weights: attention and MLP of each block.
        schedule: which heads and groups are on.
        budget: bytes of copies to keep; None = one more copy of the block weights.

    Attributes:
        all_fit: whether the whole schedule's slices fit the budget: none is then ever dropped.

    Raises:
        ConfigError: the budget is smaller than one block.
    """

    def __init__(
        self,
        weights: Sequence[tuple[AttentionParts, MlpParts]],
        schedule: SubnetSchedule,
        budget: int | None = None,
    ) -> None:
        self._weights, self._schedule, self._asked = weights, schedule, budget
        self._head_masks, self._head_rows = _distinct(schedule.head_rows, schedule.rows)
        self._group_masks, self._group_rows = _distinct(schedule.group_rows, schedule.rows)
        self._cache = PackCache()
        self.measure()
        self._side: torch.cuda.Stream | None = None
        self._lock = threading.Lock()
        self._hits = self._misses = self._views = 0

    def get(self, position: int, block: int, counted: bool = True) -> PackedBlock:
        """A block's slices for the schedule's timestep at ``position``.

        Args:
            counted: whether slices that are there count as hits.
        """
        made = False

        def part(key: tuple[str, int, int], pack: Callable[[New], Part]) -> Part:
            def make(new: New) -> _Made[Part]:
                nonlocal made
                made = True
                return _Made(pack(new))

            return self._cache.get(key, self._sizes[key], make).on_this_stream()

        attention, mlp = self._weights[block]
        head, group = int(self._head_rows[position, block]), int(self._group_rows[position, block])
        packed = PackedBlock.of(
            part(("heads", block, head), partial(pack_attention, attention, self._head_masks[head])),
            part(("groups", block, group), partial(pack_mlp, mlp, self._group_masks[group])),
        )
        with self._lock:
            self._misses += made
            self._views += made and not packed.copied_bytes
            self._hits += counted and not made
        return packed

    def forget(self) -> None:
        """Drop every packing, and the memory that was kept for them: the weights are about to move."""
        self._cache.reset(self._cache.budget)

    def measure(self) -> None:
        """Look at the weights anew, which have moved or have another dtype; nothing is packed then.

        Raises:
            ConfigError: the budget is smaller than one block of what they are now.
        """
        blocks = [block_bytes(*parts) for parts in self._weights]
        budget = sum(blocks) if self._asked is None else self._asked
        self._sizes = self._measured()
        copied = [size for size in self._sizes.values() if size]
        self.all_fit = sum(copied) <= budget
        self._cache.reset(budget)
        check_budget(budget, max(blocks))
        attention, _ = self._weights[0]
        padding = len(copied) * COPIES * ALIGNMENT  # never written
        arena = arena_for(attention.out.weight, min(budget, sum(copied)) + padding)
        self._cache.reset(budget, arena)

    def statistics(self) -> PackStatistics:
        """Counters so far."""
        cache = self._cache
        with self._lock:
            return PackStatistics(self._hits, self._misses, cache.bytes, cache.evictions, self._views)

    def prepare_next(self, position: int, device: torch.device) -> None:
        """Make the slices of the timestep after ``position``, on a GPU beside what it computes from now on.

        On the CPU there is nothing beside. Nor is it done where two timesteps' slices do not fit the budget:
        it would push out what is still needed.
        """
        if device.type != "cuda" or position + 1 == len(self._schedule.timesteps):
            return
        if self._size_at(position) + self._size_at(position + 1) > self._cache.budget:
            return
        if self._side is None:
            self._side = torch.cuda.Stream(device)
        self._side.wait_stream(torch.cuda.current_stream(device))  # the weights may be in the making
        with torch.cuda.stream(self._side):
            for block in range(len(self._weights)):
                self.get(position + 1, block, counted=False)

    def _size_at(self, position: int) -> int:
        keys = (
            (kind, block, int(row))
            for kind, rows in (("heads", self._head_rows), ("groups", self._group_rows))
            for block, row in enumerate(rows[position])
        )
        return sum(self._sizes[key] for key in keys)

    def _measured(self) -> dict[tuple[str, int, int], int]:
        """Bytes of copies of every packing of the schedule: ``heads`` or ``groups``, block, row."""
        found = {}
        for block, (attention, mlp) in enumerate(self._weights):
            for row in np.unique(self._head_rows[:, block]).tolist():
                found["heads", block, row] = attention_bytes(attention, self._head_masks[row])
            for row in np.unique(self._group_rows[:, block]).tolist():
                found["groups", block, row] = mlp_bytes(mlp, self._group_masks[row])
        return found


@dataclass
class _Made(Generic[Part]):
    """A packing, and the GPU streams that may read it: others wait until it is there, and hold its memory."""

    packed: Part
    ready: Any = None
    streams: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if (device := self._device()) is not None:
            stream = torch.cuda.current_stream(device)
            self.ready = stream.record_event()
            self.streams.add(stream.cuda_stream)

    @property
    def copied_bytes(self) -> int:
        """Memory that it takes beyond the original weights."""
        return self.packed.copied_bytes

    def on_this_stream(self) -> Part:
        """The packing, for use on the current stream."""
        if self.ready is not None and (device := self._device()) is not None:
            stream = torch.cuda.current_stream(device)
            if stream.cuda_stream not in self.streams:
                stream.wait_event(self.ready)
                for tensor in tensors_of(self.packed):
                    tensor.record_stream(stream)  # its memory must not go to others before
                self.streams.add(stream.cuda_stream)
        return self.packed

    def _device(self) -> torch.device | None:
        """The GPU that copies lie on; None for views, and on the CPU."""
        tensors: list[Tensor] = tensors_of(self.packed) if self.packed.copied_bytes else []
        return tensors[0].device if tensors and tensors[0].is_cuda else None


def _distinct(masks: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ones of masks (U, K), and their rows (S, L) where ``rows`` (S, L) point into ``masks``."""
    distinct, index = np.unique(masks, axis=0, return_inverse=True)
    return distinct, index.reshape(-1)[rows]
