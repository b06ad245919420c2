"""Packed weights under a budget of bytes: least recently used leaves first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from dydit.errors import ConfigError
from dydit.runtime.packing import tensors_of
from dydit.runtime.slots import Slots
from dydit.runtime.streams import Ready


@dataclass(frozen=True)
class Cut:
    """An attention or an MLP cut down to one mask, by copies.

    Attributes:
        key: of the slots. Cuts of one key share them: what the one had is written over by the other.
        mask: tells the cuts of one key apart.
        size: bytes of the slots.
        order: component in each slot.
        make: makes the slots.
    """

    key: Hashable
    mask: int
    size: int
    order: np.ndarray
    make: Callable[[], Slots]


@dataclass
class Entry:
    """Slots of ``size`` bytes, and the packing they hold.

    ``users`` is how many are reading it. Memory must not be written over before they have ended; on a GPU,
    where the work goes on after that, streams see to it (``Ready``).
    """

    slots: Slots
    size: int
    mask: int | None = None
    packed: Any = None  # a PackedAttention or a PackedMlp
    ready: Ready = field(default_factory=lambda: Ready([]))
    users: int = 0


class PackCache:
    """Slots by key, least recently used out first, never above ``budget`` bytes.

    Safe for several threads: what one is reading is neither dropped nor written over; others wait for it.

    Attributes:
        budget: bytes; none before ``reset``.
        bytes: memory that the slots take.
        copied: bytes copied into them so far.
        evictions: packings dropped or written over so far.
    """

    def __init__(self) -> None:
        self.budget: float = 0
        self.bytes = self.copied = self.evictions = 0
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._changed = threading.Condition()

    def reset(self, budget: float) -> None:
        """Forget every packing; what is counted goes on.

        Args:
            budget: bytes, from now on.
        """
        with self._changed:
            self._entries.clear()
            self.budget, self.bytes = budget, 0

    def take(self, cuts: Sequence[Cut]) -> tuple[list[Entry], bool]:
        """Entries with the packings of ``cuts``, to read until ``give_back``; and whether any had to be made.

        All of them at once, so that no two threads wait for each other.

        Raises:
            ConfigError: the budget is too small for them.
        """
        with self._changed:
            entries = [self._entries.get(cut.key) for cut in cuts]
            made = any(e is None or e.mask != cut.mask for e, cut in zip(entries, cuts, strict=True))
            if made:
                check_budget(self.budget, sum(cut.size for cut in cuts))
                self._changed.wait_for(lambda: self._can_have(cuts))
                made = self._make(cuts)  # another thread may have, meanwhile
            taken = [self._entries[cut.key] for cut in cuts]
            for cut, entry in zip(cuts, taken, strict=True):
                entry.ready.on_this_stream()
                self._entries.move_to_end(cut.key)
            for entry in taken:  # when nothing can fail any more
                entry.users += 1
        return taken, made

    def give_back(self, entries: Sequence[Entry]) -> None:
        """The end of reading."""
        with self._changed:
            for entry in entries:
                entry.users -= 1
            self._changed.notify_all()

    def _can_have(self, cuts: Sequence[Cut]) -> bool:
        """Whether nobody is reading what would have to be written over or dropped."""
        held = {cut.key: (cut, self._entries[cut.key]) for cut in cuts if cut.key in self._entries}
        if any(entry.users and entry.mask != cut.mask for cut, entry in held.values()):
            return False
        missing = sum(cut.size for cut in cuts if cut.key not in held)
        stay = (entry.size for key, entry in self._entries.items() if entry.users or key in held)
        return not missing or sum(stay) + missing <= self.budget

    def _make(self, cuts: Sequence[Cut]) -> bool:
        """Have the cuts' packings in the cache; whether one had to be made."""
        made = False
        for cut in cuts:
            if cut.key not in self._entries:
                self._make_room(cut.size, {cut.key for cut in cuts})
                self._entries[cut.key] = Entry(cut.make(), cut.size)
                self.bytes += cut.size
            entry = self._entries[cut.key]
            if entry.mask != cut.mask:
                self._fill(entry, cut)
                made = True
        return made

    def _fill(self, entry: Entry, cut: Cut) -> None:
        self.evictions += entry.mask is not None
        entry.mask = None  # in case that the copy fails
        entry.packed, copied = entry.slots.fill(cut.order)
        entry.ready, entry.mask = Ready(tensors_of(entry.packed)), cut.mask
        self.copied += copied

    def _make_room(self, size: int, wanted: set[Hashable]) -> None:
        for key in [key for key, e in self._entries.items() if not e.users and key not in wanted]:
            if self.bytes + size <= self.budget:
                return
            dropped = self._entries.pop(key)
            self.bytes -= dropped.size
            self.evictions += 1


def check_budget(budget: Any, largest: int) -> None:
    """Refuse a budget that one packed block can exceed.

    Raises:
        ConfigError: says how many bytes a block takes.
    """
    if not isinstance(budget, Real) or not float(budget) >= largest:  # nan is no budget either
        raise ConfigError(
            f"memory budget of {budget} bytes",
            expected=f"at least one block's {largest} bytes",
            remedy="raise the budget or leave it at its default",
        )
