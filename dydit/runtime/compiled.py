"""The stages of a sliced block, compiled by torch.compile: one graph each for all blocks and timesteps.

Weights are inputs of a stage, and so are the parameters of the block. Widths and token counts turn into
symbolic sizes as soon as a second one is seen, so the number of graphs does not grow with the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
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
        attend=_compiled(SlicedBlock.attend, lambda packed: (len(packed.qkv), packed.by_head)),
        mlp_of_all=_compiled(SlicedBlock.mlp_of_all),
        mlp_of_kept=_of_any_number(_compiled(SlicedBlock.mlp_of_kept)),
        mlp_of_top=_of_several(_compiled(SlicedBlock.mlp_of_top)),
    )


def _compiled(
    function: Callable[..., Any], form: Callable[[PackedBlock], Hashable] = lambda _: None
) -> Callable[..., Any]:
    """A stage compiled with code objects of its own, one for each of what no graph can share.

    torch.compile keeps graphs per code object, and when there are 8 of them quietly goes on without. So those
    of other engines must not count here, nor those of another dtype, mode or form. A size of 1 is never
    symbolic, so neither those of a batch of one sample; any other size of a batch is symbolic from the first
    call on.

    Args:
        form: what of the packed weights decides which operations there are.
    """
    made: dict[Hashable, Callable[..., Any]] = {}

    @wraps(function)
    def run(
        block: SlicedBlock, x: Tensor, of_batch: Conditioning | Modulation, packed: PackedBlock, *inputs: Any
    ) -> Any:
        key = *_circumstances(x), form(packed)
        if key not in made:
            made.setdefault(key, torch.compile(_twin(function)))  # another thread's may be there
        if len(x) > 1:
            fields = of_batch if isinstance(of_batch, Modulation) else vars(of_batch).values()
            for tensor in (x, *fields, *inputs):
                if isinstance(tensor, Tensor) and len(tensor) == len(x):
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return made[key](block, x, of_batch, packed, *inputs)

    return run


def _circumstances(x: Tensor) -> tuple[Hashable, ...]:
    """What a graph for tokens x (B, N, D) holds for, besides sizes."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return len(x) == 1, x.dtype, x.device, autocast, torch.is_inference_mode_enabled()


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
