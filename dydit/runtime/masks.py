"""The masks of heads, or of groups, that a schedule's blocks run with."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from dydit.runtime.packing import is_view
from dydit.runtime.slots import slot_orders


class Masks:
    """Masks of one kind over the timesteps and blocks of a schedule; a number tells equal ones.

    Args:
        masks: bool (U, K).
        rows: index (S, L) into ``masks`` of each timestep's and block's.

    Attributes:
        distinct: the distinct ones of ``masks``, bool (V, K).
        numbers: index (S, L) into ``distinct``.
    """

    def __init__(self, masks: np.ndarray, rows: np.ndarray) -> None:
        self.distinct, index = np.unique(masks, axis=0, return_inverse=True)
        self.numbers = index.reshape(-1)[rows]
        self._orders: dict[int, dict[int, np.ndarray]] = {}

    @cached_property
    def views(self) -> np.ndarray:
        """Which of the distinct masks copy nothing, bool (V,)."""
        return np.array([is_view(mask) for mask in self.distinct])

    def counts_of_copies(self, block: int) -> np.ndarray:
        """Number of components of each mask of a block that is copied."""
        numbers = np.unique(self.numbers[:, block])
        return self.distinct[numbers[~self.views[numbers]]].sum(-1)

    def order(self, block: int, number: int) -> np.ndarray:
        """Component in each slot for one of a block's masks that is copied (``slot_orders``)."""
        if block not in self._orders:
            appearing = dict.fromkeys(self.numbers[:, block].tolist())
            copied = [number for number in appearing if not self.views[number]]
            orders = slot_orders([self.distinct[number] for number in copied])
            self._orders[block] = dict(zip(copied, orders, strict=True))
        return self._orders[block][number]
