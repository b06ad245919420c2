"""Tables that translate tensor names between layouts, total in both directions.

A row relates one of our tensors to one or several of another layout's. ``{i}`` stands for a block's number,
``{every}`` for all of them, ``{rest}`` for the remainder of a name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dydit.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Relation:
    """How our tensor is made of another layout's, and back.

    Attributes:
        join: their named tensors, read one after the other -> ours.
        split: ours, and how many theirs are -> theirs.
        part_shape: our shape, and how many theirs are -> the shape of each of theirs.
    """

    join: Callable[[Iterator[tuple[str, Tensor]]], Tensor]
    split: Callable[[Tensor, int], Sequence[Tensor]]
    part_shape: Callable[[Shape, int], Shape]


def _first_of_equals(parts: Iterator[tuple[str, Tensor]]) -> Tensor:
    first_name, first = next(parts)
    for name, tensor in parts:
        if not torch.equal(first, tensor):
            raise CheckpointError(
                f"{name} differs from {first_name}",
                expected="equal copies: a DiT has one for all blocks",
                remedy="convert the diffusers model itself with dydit.convert, which keeps them apart",
            )
    return first


SAME = Relation(
    join=lambda parts: next(parts)[1], split=lambda ours, _: [ours], part_shape=lambda shape, _: shape
)
# One fused layer for several: their rows on top of each other.
ROWS = Relation(
    join=lambda parts: torch.cat([tensor for _, tensor in parts]),
    split=lambda ours, parts: ours.chunk(parts),
    part_shape=lambda shape, parts: (shape[0] // parts, *shape[1:]),
)
# One tensor here, a copy of it in every block there.
COPIES = Relation(
    join=_first_of_equals,
    split=lambda ours, parts: [ours.clone() for _ in range(parts)],
    part_shape=lambda shape, _: shape,
)


@dataclass(frozen=True)
class Row:
    """One line of a table: our name, their names, how they relate."""

    ours: str
    theirs: tuple[str, ...]
    relation: Relation = SAME


@dataclass(frozen=True)
class Entry:
    """A row for one tensor, with every placeholder filled in."""

    ours: str
    theirs: tuple[str, ...]
    relation: Relation = SAME


IDENTITY = (Row("{rest}", ("{rest}",)),)


def expand(table: Sequence[Row], names: Iterable[str], depth: int) -> list[Entry]:
    """One entry for each of our tensors.

    Args:
        table: the rows; the first that fits a name counts.
        names: our tensors.
        depth: number of blocks.

    Raises:
        CheckpointError: a tensor has no row.
    """
    patterns = [(re.compile(_regex(row.ours)), row) for row in table]
    return [_entry(patterns, name, depth) for name in names]


def _entry(patterns: list[tuple[re.Pattern[str], Row]], name: str, depth: int) -> Entry:
    for pattern, row in patterns:
        if match := pattern.fullmatch(name):
            theirs = [
                template.format(every=block, **match.groupdict())
                for template in row.theirs
                for block in range(depth if "{every}" in template else 1)
            ]
            return Entry(name, tuple(theirs), row.relation)
    raise CheckpointError(f"tensor {name} has no counterpart in the other layout")


def _regex(template: str) -> str:
    return re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{rest\}", "(?P<rest>.+)")
