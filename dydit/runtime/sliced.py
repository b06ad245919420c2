"""One block in its deployed form: sliced weights, gathered tokens; the twin of ``dynamic.masked``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit.adapters.base import Adapter
from dydit.models.blocks import Conditioning, Modulation, add_gated, modulate
from dydit.processor import HAS_AMX
from dydit.routing.gates import logit
from dydit.routing.tokens import top_tokens
from dydit.runtime.layers import sliced_attention, sliced_mlp
from dydit.runtime.packing import PackedBlock
from dydit.runtime.workspace import Workspace, over, space

SIZES_PER_OCTAVE = 8 if HAS_AMX else 16  # kernels for AMX take more memory, and more of them save no time


def filled_up(count: int, sizes: int = SIZES_PER_OCTAVE) -> int:
    """The number of rows to compute for ``count``: one of ``sizes`` of its octave at most, a multiple of 16.

    For bfloat16 and float16 on the CPU, where oneDNN makes a kernel for each size and keeps it: with sizes
    that no call has in common with another, that takes time in every call, and its memory grows.
    """
    step = max(16, (1 << count.bit_length()) // (2 * sizes))
    return -(-count // step) * step


class Named(nn.Module):
    """Calls a function; a module only so that fvcore can tell whose MACs it counts."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Tensor:
        """What the function returns."""
        return self.function(*inputs)


class SlicedBlock(nn.Module):
    """Runs one block of a backbone with packed weights.

    A module only so that fvcore can tell its MACs; it owns no parameter.

    Args:
        adapter: facts of the architecture.
        block: the backbone's block.
        token_router: logits (..., N) of tokens (..., N, D); None keeps every token.
        token_threshold: score above which a token enters the MLP.
        stages: how the parts of the computation are run; None: as they are written here.
    """

    def __init__(
        self,
        adapter: Adapter,
        block: nn.Module,
        token_router: nn.Module | None,
        token_threshold: float,
        stages: Stages | None = None,
    ) -> None:
        super().__init__()
        self._parts = (adapter, block, token_router)  # a tuple, so that nothing is registered twice
        self._token_logit = logit(token_threshold)
        self._stages = STAGES if stages is None else stages
        self.sliced_attention, self.sliced_mlp = Named(sliced_attention), Named(sliced_mlp)

    def forward(
        self,
        x: Tensor,
        cond: Conditioning,
        packed: PackedBlock,
        capacity: int | None = None,
        fill_up: bool = False,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """Tokens x (B, N, D) to tokens (B, N, D).

        Args:
            cond: the batch's conditioning.
            packed: the block's sliced weights.
            capacity: tokens of each sample that enter the MLP, highest scores first; None: those above
                the threshold.
            fill_up: whether the MLP of some tokens is to run on ``filled_up`` many.
            workspace: memory for what is computed on the way; None: new memory. Not for compiled stages.
        """
        stages, room = self._stages, {"workspace": workspace} if workspace is not None else {}
        if torch.jit.is_tracing():  # fvcore counts what it can trace: no compiled code, no ``out``
            stages, room = STAGES, {}
        x, m, logits = stages.attend(self, x, cond, packed, **room)
        B, N, _ = x.shape
        if logits is None or capacity == N:
            return stages.mlp_of_all(self, x, m, packed, **room)
        if capacity == 0:
            return x
        if capacity is None:
            kept = (logits.flatten() > self._token_logit).nonzero().squeeze(1)  # (K,)
        elif fill_up:
            kept = top_rows(logits, capacity)
        else:
            return stages.mlp_of_top(self, x, m, packed, logits, capacity, **room)
        if len(kept) == B * N:
            return stages.mlp_of_all(self, x, m, packed, **room)
        if not len(kept):
            return x
        # The last token again and again, as rows ascend.
        rows = F.pad(kept, (0, filled_up(len(kept)) - len(kept)), value=B * N - 1) if fill_up else None
        return stages.mlp_of_kept(self, x, m, packed, kept, rows, **room)

    def attend(
        self, x: Tensor, cond: Conditioning, packed: PackedBlock, workspace: Workspace | None = None
    ) -> tuple[Tensor, Modulation, Tensor | None]:
        """The block up to its MLP: tokens (B, N, D), modulation, token logits (B, N).

        With a workspace x itself is written over, else the tokens are a tensor of their own.
        """
        adapter, block, router = self._parts
        _restart(workspace)
        m = adapter.modulation(block, cond)
        normed = adapter.norms(block)[0](x)
        normed = modulate(normed, m.shift_attn, m.scale_attn, out=over(workspace, normed))
        branch = self.sliced_attention(packed, normed, workspace)
        x = add_gated(x, branch, m.gate_attn, out=over(workspace, x))
        x = adapter.cross(block, x, cond)
        return x, m, None if router is None else router(x)

    def mlp_of_all(
        self, x: Tensor, m: Modulation, packed: PackedBlock, workspace: Workspace | None = None
    ) -> Tensor:
        """The MLP's branch of every token."""
        _restart(workspace)
        normed = self._norm(x)
        normed = modulate(normed, m.shift_mlp, m.scale_mlp, out=over(workspace, normed))
        update = self.sliced_mlp(packed, self._act, normed, workspace)
        return add_gated(x, update, m.gate_mlp, out=over(workspace, x))

    def mlp_of_kept(
        self,
        x: Tensor,
        m: Modulation,
        packed: PackedBlock,
        kept: Tensor,
        rows: Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """The MLP's branch of the tokens at ``kept`` (K,) of the flattened batch, added to x in place.

        One gather for the whole batch; norm, modulation, MLP and gate see the kept tokens only.

        Args:
            rows: tokens (K',) to compute, in ascending order, of which ``kept`` are the first; None: these
                alone.
        """
        B, N, D = x.shape
        _restart(workspace)
        any_size, flat = rows is None, x.view(B * N, D)
        rows = kept if rows is None else rows
        of_rows = Rows(rows, B, N, workspace)
        gathered = _gather(flat, rows, workspace)
        tokens = of_rows.modulate(self._norm(gathered), m.shift_mlp, m.scale_mlp)
        update = self.sliced_mlp(packed, self._act, tokens, workspace, any_size)
        update = of_rows.gate(update, m.gate_mlp)
        if not any_size:
            gathered, update = gathered[: len(kept)], update[: len(kept)]
        return _add_rows(flat, kept, gathered, update, workspace).view(B, N, D)

    def mlp_of_top(
        self,
        x: Tensor,
        m: Modulation,
        packed: PackedBlock,
        logits: Tensor,
        k: int,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """The MLP's branch of the k tokens of each sample with the highest logits (B, N), added in place."""
        B, N, D = x.shape
        _restart(workspace)
        rows, flat = top_rows(logits, k), x.view(B * N, D)
        gathered = _gather(flat, rows, workspace).view(B, k, D)
        tokens = modulate(self._norm(gathered), m.shift_mlp, m.scale_mlp, out=over(workspace, gathered))
        update = self.sliced_mlp(packed, self._act, tokens, workspace, True)
        if m.gate_mlp is not None:
            update = torch.mul(update, m.gate_mlp.unsqueeze(1), out=space(workspace, update, *update.shape))
        return _add_rows(flat, rows, gathered.view(-1, D), update.view(-1, D), workspace).view(B, N, D)

    @property
    def _norm(self) -> nn.Module:
        adapter, block, _ = self._parts
        return adapter.norms(block)[1]

    @property
    def _act(self) -> Callable[[Tensor], Tensor]:
        adapter, block, _ = self._parts
        return adapter.mlp(block).act


class Rows:
    """Modulation and gate, one row per sample, of some tokens of a flattened batch.

    In a workspace, which is on the CPU, of the tokens of one sample after those of another; else each token
    gathers its own row, and no shape depends on the data.

    Args:
        rows: of the tokens (K,), in ascending order.
        samples: B.
        tokens: N, of a sample.
        workspace: memory for results.
    """

    def __init__(self, rows: Tensor, samples: int, tokens: int, workspace: Workspace | None) -> None:
        self._workspace, self._sample = workspace, rows // tokens
        self._counts = [] if workspace is None else self._sample.bincount(minlength=samples).tolist()

    def modulate(self, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        """x·(1 + scale) + shift over x (K, D), with shift and scale (B, D) or None; may write over x."""
        if shift is None or scale is None:
            return x
        if self._workspace is None:
            return torch.addcmul(self._of_each(shift), x, self._of_each(1 + scale))
        for part, own_shift, own_scale in zip(x.split(self._counts), shift, 1 + scale, strict=True):
            torch.addcmul(own_shift, part, own_scale, out=part)
        return x

    def gate(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """gate·x over x (K, D), with gate (B, D) or None."""
        if gate is None:
            return x
        if self._workspace is None:
            return self._of_each(gate) * x
        gated = self._workspace.empty(x.shape, x.dtype)
        for part, row, out in zip(x.split(self._counts), gate, gated.split(self._counts), strict=True):
            torch.mul(part, row, out=out)
        return gated

    def _of_each(self, of_samples: Tensor) -> Tensor:
        """Of each token (K, D), what its sample has (B, D)."""
        return _gather(of_samples, self._sample, None)


def top_rows(logits: Tensor, k: int) -> Tensor:
    """Rows (B·k,) in the flattened batch of the k tokens of each sample with the highest logits (B, N)."""
    B, N = logits.shape
    first = N * torch.arange(B, device=logits.device).unsqueeze(1)
    return (top_tokens(logits, k) + first).flatten()


def _restart(workspace: Workspace | None) -> None:
    if workspace is not None:
        workspace.restart()


def _gather(x: Tensor, rows: Tensor, workspace: Workspace | None) -> Tensor:
    """x (K, D) at ``rows`` (K',)."""
    return torch.index_select(x, 0, rows, out=space(workspace, x, rows.shape[0], x.shape[1]))


def _add_rows(
    flat: Tensor, rows: Tensor, gathered: Tensor, update: Tensor, workspace: Workspace | None
) -> Tensor:
    """flat (B·N, D) with ``update`` (K, D) added at ``rows`` (K,), each row once, in place.

    Args:
        gathered: flat at ``rows``. In a workspace it may be written over since.
    """
    if workspace is not None:
        return flat.index_add_(0, rows, update)
    # Compiled, the sum is part of the kernel that stores it; index_add would add one value after another,
    # atomically (float32), or in memory of its own (bfloat16). Under autocast it is float32, as the residual.
    return flat.index_copy_(0, rows, (gathered + update).to(flat.dtype))


@dataclass(frozen=True)
class Stages:
    """The parts of a sliced block between which something depends on the data or on the schedule.

    Each takes the block first. ``dydit.runtime.compiled`` has them compiled.
    """

    attend: Callable[..., tuple[Tensor, Modulation, Tensor | None]] = SlicedBlock.attend
    mlp_of_all: Callable[..., Tensor] = SlicedBlock.mlp_of_all
    mlp_of_kept: Callable[..., Tensor] = SlicedBlock.mlp_of_kept
    mlp_of_top: Callable[..., Tensor] = SlicedBlock.mlp_of_top


STAGES = Stages()
