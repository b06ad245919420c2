"""The packed weights of a schedule's subnetworks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dydit.adapters.base import AttentionParts, MlpParts
from dydit.export.schedule import SubnetSchedule
from dydit.runtime.cache import Cut, PackCache, check_budget
from dydit.runtime.masks import Masks
from dydit.runtime.packing import (
    PackedAttention,
    PackedBlock,
    PackedMlp,
    block_bytes,
    group_bytes,
    head_bytes,
    view_attention,
    view_mlp,
    without_the_rest,
)
from dydit.runtime.slots import Slots, attention_slots, mlp_slots

View = PackedAttention | PackedMlp  # of weights, for which nothing is copied


@dataclass(frozen=True)
class PackStatistics:
    """Counters of a schedule's blocks: one is a miss where its attention, its MLP or both had to be packed.

    Attributes:
        hits: blocks that were there.
        misses: blocks packed.
        bytes: memory that all packings take beyond the original weights.
        evictions: packings, of an attention or an MLP, dropped or written over.
        views: blocks packed that took no memory.
        copied: bytes copied to pack blocks.
        schedule_bytes: memory that all packings of the schedule would take, each mask apart.
    """

    hits: int
    misses: int
    bytes: int
    evictions: int
    views: int
    copied: int
    schedule_bytes: int


class SchedulePacks:
    """Packed blocks by timestep, made when they are first asked for.

    A block's attention and its MLP are packed apart: once per mask of heads, and once per mask of groups.
    Where the budget holds the copies of the whole schedule they all stay. Else, on the CPU, each block has
    slots for its largest masks, and the next mask takes the place of the last; on a GPU, which prepares the
    next timestep beside the current one, each mask has slots of its own.

    Args:
        weights: attention and MLP of each block.
        schedule: which heads and groups are on.
        budget: bytes of copies to keep; None = one more copy of the block weights.

    Attributes:
        asked: the budget as given.
        all_fit: whether the whole schedule's slices fit the budget: none is then ever dropped.

    Raises:
        ConfigError: the budget is smaller than one block.
    """

    def __init__(
        self,
        weights: Sequence[tuple[AttentionParts, MlpParts]],
        schedule: SubnetSchedule,
        budget: float | None = None,
    ) -> None:
        self.asked = budget
        attentions, mlps = zip(*weights, strict=True)
        heads, groups = (Masks(rows, schedule.rows) for rows in (schedule.head_rows, schedule.group_rows))
        G = schedule.shape.mlp_groups
        self._kinds: tuple[_Kind, ...] = (
            _Kind(heads, attentions, head_bytes, view_attention, attention_slots),
            _Kind(groups, mlps, partial(group_bytes, groups=G), view_mlp, partial(mlp_slots, groups=G)),
        )
        self._blocks = weights
        self._cache = PackCache()
        self._lock = threading.Lock()
        self._hits = self._misses = self._views = 0
        self._side: torch.cuda.Stream | None = None
        self.measure()

    @contextmanager
    def use(self, position: int, block: int, counted: bool = True) -> Iterator[PackedBlock]:
        """A block's slices for the schedule's timestep at ``position``, to read within the ``with``.

        Args:
            counted: whether slices that are there count as hits.
        """
        parts, cuts, new_view = self._parts(position, block)
        entries, copied = self._cache.take(cuts)
        try:
            made = iter(entries)
            attention, mlp = (next(made).packed if isinstance(part, Cut) else part for part in parts)
            packed = PackedBlock.of(attention, mlp)
            missed = copied or new_view
            with self._lock:
                self._misses += missed
                self._views += missed and not packed.copied_bytes
                self._hits += counted and not missed
            yield packed
        finally:
            self._cache.give_back(entries)

    def take(self, position: int, block: int) -> PackedBlock:
        """Slices as ``use`` has them, in memory of their own that does not count against the budget."""
        attention, mlp = (kind.take(position, block) for kind in self._kinds)
        return PackedBlock.of(attention, mlp)

    def forget(self) -> None:
        """Drop every packing: the weights are about to move."""
        self._start(self._cache.budget)

    def measure(self) -> None:
        """Look at the weights anew, which have moved or have another dtype; nothing is packed then.

        Raises:
            ConfigError: the budget is smaller than one block of what they are now.
        """
        blocks = [block_bytes(*parts) for parts in self._blocks]
        budget = sum(blocks) if self.asked is None else self.asked
        self._place = self._weights_place
        check_budget(budget, max(blocks))
        self._sizes = {
            (index, block, number): kind.bytes_of_copy(block, number)
            for index, kind in enumerate(self._kinds)
            for block in range(len(blocks))
            for number in kind.masks.of_block(block)
        }
        self.all_fit = sum(self._sizes.values()) <= budget
        self._one_for_all = not self.all_fit and not self._blocks[0][0].out.weight.is_cuda
        self._start(budget)

    @property
    def stale(self) -> bool:
        """Whether the weights lie elsewhere, or have another dtype, than when they were measured."""
        return self._place != self._weights_place

    @property
    def _weights_place(self) -> tuple[int, torch.dtype]:
        weight = self._blocks[-1][1].fc2.weight  # they move together
        return weight.data_ptr(), weight.dtype

    def statistics(self) -> PackStatistics:
        """Counters so far."""
        cache = self._cache
        with self._lock:
            return PackStatistics(
                self._hits, self._misses, cache.bytes, cache.evictions, self._views, cache.copied,
                sum(self._sizes.values()),
            )  # fmt: skip

    @contextmanager
    def preparing_next(self, position: int, device: torch.device) -> Iterator[None]:
        """On a GPU, make the slices of the timestep after ``position`` beside what the ``with`` launches.

        On the CPU there is nothing beside. Nor is it done where two timesteps' slices do not fit the budget:
        it would push out what is still needed.
        """
        if device.type != "cuda" or not self._prepares_after(position):
            yield
            return
        with self._lock:
            side = self._side = self._side or torch.cuda.Stream(device)
        before = torch.cuda.current_stream(device).record_event()
        yield  # first, so that what is least recently used is not what this timestep needs
        side.wait_event(before)  # the weights may have been in the making
        with torch.cuda.stream(side):
            for block in range(len(self._blocks)):
                with self.use(position + 1, block, counted=False):
                    pass
        self._prepared.add(position)

    def _prepares_after(self, position: int) -> bool:
        if position + 1 == len(self._kinds[0].masks.numbers):
            return False
        if self.all_fit:
            return position not in self._prepared  # what was made stays
        return self.bytes_at(position, position + 1) <= self._cache.budget

    def bytes_at(self, *positions: int) -> int:
        """Memory of the slices of some timesteps together, those that they share once, each mask apart."""
        parts = {
            (index, block, number)
            for index, kind in enumerate(self._kinds)
            for position in positions
            for block, number in enumerate(kind.masks.numbers[position].tolist())
        }
        return sum(self._sizes[part] for part in parts)

    def _start(self, budget: float) -> None:
        """With nothing packed."""
        self._known: dict[tuple[int, int, int], Cut | View] = {}
        self._parts_of: dict[tuple[int, int], tuple[list[Cut | View], list[Cut]]] = {}
        self._prepared: set[int] = set()  # positions after which the next was
        self._side = None  # the weights may go to another device
        self._cache.reset(budget)

    def _parts(self, position: int, block: int) -> tuple[list[Any], list[Cut], bool]:
        """A block's attention and MLP; those of them that are cuts; and whether one is a view, new."""
        if (position, block) in self._parts_of:
            return *self._parts_of[position, block], False
        found, new_view = [], False
        for index, kind in enumerate(self._kinds):
            number = kind.number(position, block)
            key = index, block, number
            with self._lock:
                if key not in self._known:
                    self._known[key] = kind.part(block, number, (index, block), self._one_for_all)
                    new_view |= not isinstance(self._known[key], Cut)
                found.append(self._known[key])
        cuts = [part for part in found if isinstance(part, Cut)]
        self._parts_of[position, block] = found, cuts
        return found, cuts, new_view


@dataclass(frozen=True)
class _Kind:
    """What is packed by masks of one kind: the attentions, or the MLPs, of all blocks.

    Attributes:
        masks: of the schedule.
        parts: by block.
        component_bytes: of a part's copy of one component.
        view: a part's packing for a mask that copies nothing.
        slots: a part's slots, so many.
    """

    masks: Masks
    parts: Sequence[Any]
    component_bytes: Callable[[Any], int]
    view: Callable[[Any, np.ndarray], View]
    slots: Callable[..., Slots]

    def bytes_of_copy(self, block: int, number: int) -> int:
        """Of a block's mask; 0 for a view."""
        if self.masks.views[number]:
            return 0
        return int(self.masks.distinct[number].sum()) * self.component_bytes(self.parts[block])

    def number(self, position: int, block: int) -> int:
        """Of a block's mask at a timestep."""
        return int(self.masks.numbers[position, block])

    def take(self, position: int, block: int) -> Any:
        """A block's packing at a timestep, in memory of its own."""
        part = self.part(block, self.number(position, block))
        return part.make().fill(part.order)[0] if isinstance(part, Cut) else without_the_rest(part)

    def part(
        self, block: int, number: int, key: tuple[int, ...] = (), one_for_all: bool = False
    ) -> Cut | View:
        """A block's part cut down to one of its masks.

        Args:
            key: tells blocks and kinds apart.
            one_for_all: whether all masks of the block share slots, else each has its own.
        """
        part, mask = self.parts[block], self.masks.distinct[number]
        if self.masks.views[number]:
            return self.view(part, mask)
        order = self.masks.order(block, number)
        capacity = self.masks.most(block) if one_for_all else len(order)
        return Cut(
            key=key if one_for_all else (*key, number),
            mask=number,
            size=capacity * self.component_bytes(part),
            order=order,
            make=partial(self.slots, part, capacity=capacity),
        )
