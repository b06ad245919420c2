"""Packed weights under a budget of bytes: least recently used leaves first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from dydit.errors import ConfigError
from dydit.runtime.arena import Arena
from dydit.runtime.packing import New


class Sized(Protocol):
    """What a cache keeps."""

    @property
    def copied_bytes(self) -> int:
        """Memory that it takes beyond the original weights."""


Packing = TypeVar("Packing", bound=Sized)


class PackCache:
    """Packings by key, least recently used out first, never above ``budget`` bytes of copies.

    Safe for several threads: a packing in use stays alive through its reference.

    Attributes:
        budget: bytes; none before ``reset``.
        bytes: memory that the packings take beyond the original weights.
        evictions: packings dropped so far.
    """

    def __init__(self) -> None:
        self.budget = self.bytes = self.evictions = 0
        self._arena: Arena | None = None
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def reset(self, budget: int, arena: Arena | None = None) -> None:
        """Forget every packing; the count of evictions goes on.

        Args:
            budget: bytes, from now on.
            arena: what copies are made in; None: wherever PyTorch puts them.
        """
        with self._lock:
            self._entries.clear()
            self.budget, self.bytes, self._arena = budget, 0, arena

    def get(self, key: Hashable, size: int, make: Callable[[New], Packing]) -> Packing:
        """The packing under ``key``, of ``size`` bytes of copies, made by ``make`` where it is not there.

        Others leave before it is made, so that the copies never take more than the budget together.

        Args:
            make: gets a function that gives its copies their memory.
        """
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
            while self._entries and self.bytes + size > self.budget:
                self._drop_oldest()
            packed = self._entries[key] = make(self._new)
            self.bytes += packed.copied_bytes
            return packed

    def _new(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Memory in the arena, where the oldest packings leave until there is a gap."""
        if self._arena is None or like.device.type != "cpu":
            return like.new_empty(shape)
        while (new := self._arena.empty(shape, like.dtype)) is None:
            if not self._entries:  # what was dropped is still in use, in other threads or by this block
                return like.new_empty(shape)
            self._drop_oldest()
        return new

    def _drop_oldest(self) -> None:
        _, dropped = self._entries.popitem(last=False)
        self.bytes -= dropped.copied_bytes
        self.evictions += 1


def arena_for(weight: Tensor, size: float) -> Arena | None:
    """An arena of ``size`` bytes for copies of a CPU weight.

    None for other devices, which PyTorch keeps such pools for, and where the system does not give the range.
    """
    if weight.device.type != "cpu" or not size:
        return None
    try:
        return Arena(int(size))
    except RuntimeError:  # torch's word for memory that there is not
        return None


def check_budget(budget: int, largest: int) -> None:
    """Refuse a budget that one packed block can exceed.

    Raises:
        ConfigError: says how many bytes a block takes.
    """
    if budget < largest:
        raise ConfigError(
            f"memory budget of {budget} bytes",
            expected=f"at least one block's {largest} bytes",
            remedy="raise the budget or leave it at its default",
        )
