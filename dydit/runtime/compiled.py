"""The stages of a sliced block, compiled by torch.compile: one graph each for all blocks and timesteps.

Weights are inputs of a stage, and so are the parameters of the block. Widths and token counts turn into
symbolic sizes as soon as a second one is seen, so the number of graphs does not grow with the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from dydit.models.blocks import Conditioning, Modulation
from dydit.runtime.packing import PackedBlock
from dydit.runtime.sliced import SlicedBlock, Stages


def compiled_stages() -> Stages:
    """Stages for the blocks of one engine; each is compiled when it is first called."""
    return Stages(
        attend=_compiled(SlicedBlock.attend),
        mlp_of_all=_compiled(SlicedBlock.mlp_of_all),
        mlp_of_kept=_of_any_number(_compiled(SlicedBlock.mlp_of_kept)),
        mlp_of_top=_of_several(_compiled(SlicedBlock.mlp_of_top)),
    )


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A stage compiled with code objects of its own: one for batches of one sample, one for all others.

    torch.compile keeps and limits its graphs per code object: those of other engines must not count here. A
    size of 1 is never symbolic, so a batch of one sample takes graphs that no other can use; any other size
    of a batch is symbolic from the first call on.
    """
    alone, together = (torch.compile(_twin(function)) for _ in range(2))

    @wraps(function)
    def run(block: SlicedBlock, x: Tensor, of_batch: Conditioning | Modulation, *inputs: Any) -> Any:
        if len(x) == 1:
            return alone(block, x, of_batch, *inputs)
        fields = of_batch if isinstance(of_batch, Modulation) else vars(of_batch).values()
        for tensor in (x, *fields, *inputs):
            if isinstance(tensor, Tensor) and len(tensor) == len(x):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return together(block, x, of_batch, *inputs)

    return run


def _twin(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with another code object."""
    assert isinstance(function, FunctionType)
    return FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _of_several(stage: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``mlp_of_top`` for several tokens per sample; one, a size that is never symbolic, is not compiled."""

    @wraps(stage)
    def run(
        block: SlicedBlock, x: Tensor, m: Modulation, packed: PackedBlock, logits: Tensor, k: int
    ) -> Tensor:
        if k == 1:
            return block.mlp_of_top(x, m, packed, logits, k)
        return stage(block, x, m, packed, logits, k)

    return run


def _of_any_number(stage: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``mlp_of_kept`` for a number of tokens that is another one in every call."""

    @wraps(stage)
    def run(
        block: SlicedBlock, x: Tensor, m: Modulation, packed: PackedBlock, kept: Tensor, rows: None = None
    ) -> Tensor:
        if len(kept) == 1:  # a size of 1 is never symbolic: it would take a graph of its own
            return block.mlp_of_kept(x, m, packed, kept)
        torch._dynamo.maybe_mark_dynamic(kept, 0)
        return stage(block, x, m, packed, kept)

    return run
