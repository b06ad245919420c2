"""Memory for what a block computes on its way, on the CPU.

Widths and numbers of tokens differ from block to block and from timestep to timestep. Tensors of so many
sizes leave gaps between each other in the C library's heap, which then takes several times what they need;
and large ones it returns to the system and asks for again, page by page. Here they lie in one range of
memory, one behind another, from its start again in every stage of a block.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes of a cache line


class Workspace:
    """A range of memory for the tensors of one stage at a time. For one thread at a time.

    Where it is too small, a larger one takes its place in the next stage; until then, what does not fit lies
    elsewhere.
    """

    def __init__(self) -> None:
        self._memory, self._used = _memory(0), 0
        self._typed: dict[torch.dtype, Tensor] = {}  # the memory as numbers of a type

    def restart(self) -> None:
        """A stage begins: tensors of the last one may be written over."""
        needed, self._used = self._used, 0
        if needed > len(self._memory):
            self._memory, self._typed = _memory(0), {}  # first the old one goes
            self._memory = _memory(needed + needed // (8 * ALIGNMENT) * ALIGNMENT)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor, not initialised, that holds until the next stage."""
        start, numbers = self._used, math.prod(shape)
        self._used += -(-numbers * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if self._used > self._memory.nbytes:
            return torch.empty(shape, dtype=dtype, device="cpu")
        typed = self._typed.get(dtype)
        if typed is None:
            typed = self._typed[dtype] = _numbers(self._memory, dtype)
        return typed.narrow(0, start // dtype.itemsize, numbers).view(shape)


@torch.inference_mode(False)  # else it could not be written to outside of it
def _memory(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu")


@torch.inference_mode(False)
def _numbers(memory: Tensor, dtype: torch.dtype) -> Tensor:
    return memory.view(dtype)


class Workspaces:
    """Workspaces of an engine: one for each thread that is in it."""

    def __init__(self) -> None:
        self._spare: list[Workspace] = []
        self._lock = threading.Lock()

    @contextmanager
    def one(self) -> Iterator[Workspace]:
        """A workspace that nobody else uses within the ``with``."""
        with self._lock:
            workspace = self._spare.pop() if self._spare else Workspace()
        yield workspace  # not kept after an error: there may have been no memory for what it asked for
        with self._lock:
            self._spare.append(workspace)

    def clear(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._spare.clear()


def space(workspace: Workspace | None, like: Tensor, *shape: int) -> Tensor | None:
    """What a torch function takes as ``out``: memory in the workspace; None, for new memory, without one."""
    return None if workspace is None else workspace.empty(shape, like.dtype)
