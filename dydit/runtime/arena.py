"""Memory for packed weights on the CPU: one range, of which pieces are handed out and come back.

Slices of many sizes that come and go leave gaps in the C library's heap, which then takes more than the
slices together. Here they stay within the range, whatever comes and goes.
"""

from __future__ import annotations

import math
import weakref
from bisect import bisect
from collections import deque

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes of a cache line: products of weights that start elsewhere are slower

Gap = tuple[int, int]  # start and end in the range


class Arena:
    """Tensors within a range of ``size`` bytes; the place of one is free when nothing refers to it any more.

    The system gives memory when it is first written. ``empty`` is for one thread at a time; tensors may go
    in any thread.

    Raises:
        RuntimeError: the system does not give a range of this size.
    """

    def __init__(self, size: int) -> None:
        storage = torch.UntypedStorage(size + ALIGNMENT, device="cpu")  # never filled, unlike torch.empty
        # As an array: a tensor's storage holds the array that it was made from, so they end together.
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy()
        first = -self._memory.ctypes.data % ALIGNMENT
        self._gaps: list[Gap] = [(first, first + size)]  # ascending, with something used between two
        self._returned: deque[Gap] = deque()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A new tensor with a storage of its own, not initialised; None where no gap is large enough."""
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype, device="cpu")
        place = self._take(-(-size // ALIGNMENT) * ALIGNMENT)
        if place is None:
            return None
        piece = self._memory[place[0] : place[0] + size]
        weakref.finalize(piece, self._returned.append, place).atexit = False
        return torch.frombuffer(piece, dtype=dtype).view(shape).data  # .data: a view of nothing

    def _take(self, size: int) -> Gap | None:
        """The first ``size`` bytes of the first gap that has them, which are no gap any more."""
        while self._returned:
            self._give_back(self._returned.popleft())
        for index, (start, end) in enumerate(self._gaps):
            if end - start >= size:
                self._gaps[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start, start + size
        return None

    def _give_back(self, place: Gap) -> None:
        (start, end), gaps = place, self._gaps
        index = bisect(gaps, place)
        before = index > 0 and gaps[index - 1][1] == start
        after = index < len(gaps) and gaps[index][0] == end
        merged = (gaps[index - 1][0] if before else start, gaps[index][1] if after else end)
        gaps[index - before : index + after] = [merged]
