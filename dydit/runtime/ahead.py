"""Conditioning of a sampling run, of several timesteps at once: for small batches on the CPU.

adaLN's layers are a stream of weights from memory: for the few rows of one timestep they take nearly as long
as for those of many. What a run computes is the same, only sooner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from dydit.dynamic.dydit import DyDiT
from dydit.models.blocks import Conditioning, Modulation

ROWS = 32  # samples times timesteps: of DiT-XL/2's modulations 12 MB in bfloat16
_OF_CALL: ContextVar[Ahead | None] = ContextVar("ahead of the call", default=None)


class Conditioned(NamedTuple):
    """A timestep's conditioning, and each block's modulation for tokens."""

    cond: Conditioning
    modulations: list[Modulation]


class Ahead:
    """What the calls of one sampling run are conditioned on. For one thread.

    Args:
        model: in evaluation, on the CPU.
        timesteps: of the calls, in their order.
        y: labels (B,) of every call.
    """

    def __init__(self, model: DyDiT, timesteps: Sequence[float], y: Tensor) -> None:
        self._model, self._y = model, y.clone()  # a caller may write over its own
        self._weight = next(model.parameters()).data  # kept, so that no other takes its place
        self._to_come, self._made = deque(timesteps), deque[Conditioned]()

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Within it, a call of an engine with this model is one of the run."""
        before = _OF_CALL.set(self)
        try:
            yield
        finally:
            _OF_CALL.reset(before)

    def take(self, model: DyDiT, timestep: float, samples: int, y: Tensor) -> Conditioned | None:
        """Of the next call; None if it is not the one that was to come. Each is computed once."""
        if model is not self._model or next(model.parameters()).data_ptr() != self._weight.data_ptr():
            return None  # moved or converted since
        if not self._to_come or self._to_come[0] != timestep or samples != len(self._y):
            return None
        if y.dtype != self._y.dtype or not torch.equal(y, self._y):
            return None
        if not self._made:
            self._made.extend(self._next())
        self._to_come.popleft()
        return self._made.popleft()

    def _next(self) -> list[Conditioned]:
        """Of as many timesteps as ``ROWS`` rows have."""
        B, adapter, backbone = len(self._y), self._model.adapter, self._model.backbone
        steps = [*self._to_come][: max(ROWS // B, 1)]
        t = torch.tensor(steps, dtype=torch.float32, device=self._y.device).repeat_interleave(B)
        cond = adapter.condition(backbone, t, self._y.repeat(len(steps)))
        of_blocks = [m.split(B) for m in adapter.modulations([*adapter.blocks(backbone)], cond)]
        of_steps = map(list, zip(*of_blocks, strict=True))
        return [Conditioned(*parts) for parts in zip(cond.split(B), of_steps, strict=True)]


def conditioned_ahead(model: DyDiT, t: Tensor | float, samples: int, y: Tensor) -> Conditioned | None:
    """What was computed ahead for a call of the model's engine; None where it belongs to no run.

    Args:
        t: one number for the whole batch; of timesteps (B,) nothing is.
        samples: B.
        y: labels (B,).
    """
    ahead = _OF_CALL.get()
    if ahead is None or (isinstance(t, Tensor) and t.ndim):
        return None
    return ahead.take(model, float(t), samples, y)
