"""MACs by block and by part: the form in which counted and analytic figures are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dydit.costs import PARTS

OUTSIDE = "outside blocks"
OTHER = "other"  # counted in a layer that no part claims


@dataclass(frozen=True)
class MacTable:
    """MACs of a call, or of several.

    Attributes:
        cells: block ("block 0", …, and ``OUTSIDE``) -> part (``dydit.costs.PARTS``, or ``OTHER``) -> MACs.
    """

    cells: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.by_block.values())

    @property
    def by_block(self) -> dict[str, int]:
        """MACs of each block, and outside of the blocks."""
        return {block: sum(parts.values()) for block, parts in self.cells.items()}

    @property
    def by_part(self) -> dict[str, int]:
        """MACs of each part that has any, in the order of ``PARTS``."""
        sums: Counter[str] = Counter()
        for parts in self.cells.values():
            sums.update(parts)
        return {part: sums[part] for part in (*PARTS, OTHER) if sums[part]}

    def differences(self, other: MacTable) -> list[str]:
        """Where the two tables do not hold the same number: "block 3, MLP: 12 and 13 MACs"."""
        places = dict.fromkeys(
            (block, part) for table in (self, other) for block, parts in table.cells.items() for part in parts
        )
        pairs = [(*place, self._cell(*place), other._cell(*place)) for place in places]
        return [f"{block}, {part}: {mine} and {its} MACs" for block, part, mine, its in pairs if mine != its]

    @classmethod
    def sum(cls, tables: Iterable[MacTable]) -> MacTable:
        """Cell by cell."""
        cells: dict[str, Counter[str]] = {}
        for table in tables:
            for block, parts in table.cells.items():
                cells.setdefault(block, Counter()).update(parts)
        return cls(cells)

    def _cell(self, block: str, part: str) -> int:
        return self.cells.get(block, {}).get(part, 0)
