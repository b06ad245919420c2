"""The tokens after each block of a forward, taken with hooks, for distillation of block features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def block_outputs(blocks: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what ``blocks`` put out, in the order of their calls, for as long as the context lasts.

    Of a block that returns several values the first one counts. The hooks are gone before a backward, so
    that gradient checkpointing, which runs blocks again there, adds nothing.
    """
    outputs: list[Tensor] = []

    def take(_block: nn.Module, _arguments: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(take) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def feature_distance(mine: Iterable[Tensor], wanted: Iterable[Tensor]) -> Tensor:
    """‖f − f*‖² / ‖f*‖² of each sample (B,), mean over the blocks, for tokens f (B, N, D) and a teacher's f*.

    Relative, since tokens grow from block to block and the last ones would drown the others. For each sample
    by itself, so that the mean over several processes is that of one with all samples.
    """
    shares = []
    for tokens, teachers in zip(mine, wanted, strict=True):
        apart = (tokens.float() - teachers.float()).square().mean((1, 2))
        shares.append(apart / teachers.float().square().mean((1, 2)))
    return torch.stack(shares).mean(0)
