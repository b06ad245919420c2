"""The masks of heads, or of groups, that a schedule's blocks run with."""

from __future__ import annotations

import numpy as np

from dydit.export.schedule import is_one_run
from dydit.runtime.slots import slot_orders


class Masks:
    """Masks of one kind over the timesteps and blocks of a schedule; a number tells equal ones.

    Args:
        masks: bool (U, K).
        rows: index (S, L) into ``masks`` of each timestep's and block's.

    Attributes:
        distinct: the distinct ones of ``masks``, bool (V, K).
        numbers: index (S, L) into ``distinct``.
        views: which of the distinct ones copy nothing, bool (V,).
    """

    def __init__(self, masks: np.ndarray, rows: np.ndarray) -> None:
        self.distinct, index = np.unique(masks, axis=0, return_inverse=True)
        self.numbers = index.reshape(-1)[rows]
        self.views = is_one_run(self.distinct)
        self._orders: dict[int, dict[int, np.ndarray]] = {}

    def of_block(self, block: int) -> list[int]:
        """Numbers of a block's masks, in the order in which they appear."""
        return list(dict.fromkeys(self.numbers[:, block].tolist()))

    def most(self, block: int) -> int:
        """Components of the largest of a block's masks that are copied."""
        return max(len(order) for order in self._orders_of(block).values())

    def order(self, block: int, number: int) -> np.ndarray:
        """Component in each slot for one of a block's masks that is copied (``slot_orders``)."""
        return self._orders_of(block)[number]

    def _orders_of(self, block: int) -> dict[int, np.ndarray]:
        if block not in self._orders:
            copied = [number for number in self.of_block(block) if not self.views[number]]
            orders = slot_orders([self.distinct[number] for number in copied])
            self._orders[block] = dict(zip(copied, orders, strict=True))
        return self._orders[block]
