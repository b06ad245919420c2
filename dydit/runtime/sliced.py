"""One block in its deployed form: sliced weights, gathered tokens; the twin of ``dynamic.masked``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

SIZES_PER_OCTAVE = 8 if HAS_AMX else 16  # kernels for AMX take more memory, and more of them save no time
MANY = 512  # rows: the results of more take megabytes, and gaps between many sizes of them more memory


def filled_up(count: int, sizes: int = SIZES_PER_OCTAVE) -> int:
    """The number of rows to compute for ``count``: one of ``sizes`` of its octave at most, a multiple of 16.

    For bfloat16 and float16 on the CPU, where oneDNN makes a kernel for each size and keeps it: with sizes
    that no call has in common with another, that takes time in every call, and its memory grows. Above
    ``MANY`` rows half as many sizes.
    """
    step = max(16, (1 << count.bit_length()) // (sizes if count > MANY else 2 * sizes))
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
        self.parts = (adapter, block, token_router)  # a tuple, so that nothing is registered twice
        self.token_logit = logit(token_threshold)
        self._listeners: list[Callable[[Tensor], None]] = []
        self._stages = STAGES if stages is None else stages
        self.sliced_attention, self.sliced_mlp = Named(sliced_attention), Named(sliced_mlp)

    def forward(
        self,
        x: Tensor,
        cond: Conditioning,
        packed: PackedBlock,
        capacity: int | None = None,
        fill_up: bool = False,
    ) -> Tensor:
        """Tokens x (B, N, D) to tokens (B, N, D).

        Args:
            cond: the batch's conditioning.
            packed: the block's sliced weights.
            capacity: tokens of each sample that enter the MLP, highest scores first; None: those above
                the threshold.
            fill_up: whether the MLP of some tokens is to run on ``filled_up`` many, as on the CPU. Here where
                the call is counted.
        """
        stages = STAGES if torch.jit.is_tracing() else self._stages  # fvcore counts what it can trace
        x, m, logits = stages.attend(self, x, cond, packed)
        self.tell(logits)
        B, N, _ = x.shape
        if logits is None or capacity == N:
            return stages.mlp_of_all(self, x, m, packed)
        if capacity == 0:
            return x
        if capacity is None:
            kept = (logits.flatten() > self.token_logit).nonzero().squeeze(1)  # (K,)
        elif fill_up:
            kept = top_rows(logits, capacity)
        else:
            return stages.mlp_of_top(self, x, m, packed, logits, capacity)
        if len(kept) == B * N:
            return stages.mlp_of_all(self, x, m, packed)
        if not len(kept):
            return x
        # The last token again and again, as rows ascend.
        rows = F.pad(kept, (0, filled_up(len(kept)) - len(kept)), value=B * N - 1) if fill_up else None
        return stages.mlp_of_kept(self, x, m, packed, kept, rows)

    @contextmanager
    def listening(self, listener: Callable[[Tensor], None]) -> Iterator[None]:
        """Within it, ``listener`` is called with the token router's logits (B, N) of every call."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def tell(self, logits: Tensor | None) -> None:
        """Call the listeners with logits (B, N), if there are any."""
        if logits is not None:
            for listener in tuple(self._listeners):
                listener(logits)

    def attend(
        self, x: Tensor, cond: Conditioning, packed: PackedBlock
    ) -> tuple[Tensor, Modulation, Tensor | None]:
        """The block up to its MLP: tokens (B, N, D) of their own, modulation, token logits (B, N)."""
        adapter, block, router = self.parts
        m = adapter.modulation(block, cond)
        normed = modulate(adapter.norms(block)[0](x), m.shift_attn, m.scale_attn)
        x = add_gated(x, self.sliced_attention(packed, normed), m.gate_attn)
        x = adapter.cross(block, x, cond)
        return x, m, None if router is None else router(x)

    def mlp_of_all(self, x: Tensor, m: Modulation, packed: PackedBlock) -> Tensor:
        """The MLP's branch of every token."""
        normed = modulate(self._norm(x), m.shift_mlp, m.scale_mlp)
        return add_gated(x, self.sliced_mlp(packed, self._act, normed), m.gate_mlp)

    def mlp_of_kept(
        self, x: Tensor, m: Modulation, packed: PackedBlock, kept: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """The MLP's branch of the tokens at ``kept`` (K,) of the flattened batch, added to x in place.

        One gather for the whole batch; norm, modulation, MLP and gate see the kept tokens only.

        Args:
            rows: tokens (K',) to compute, in ascending order, of which ``kept`` are the first; None: these
                alone.
        """
        B, N, D = x.shape
        flat, computed = x.view(B * N, D), kept if rows is None else rows
        sample, of_samples = computed // N, (m.shift_mlp, m.scale_mlp, m.gate_mlp)
        shift, scale, gate = (None if row is None else row.index_select(0, sample) for row in of_samples)
        tokens = flat.index_select(0, computed).unsqueeze(1)  # (K', 1, D), like so many samples
        normed = modulate(self._norm(tokens), shift, scale)
        updated = add_gated(tokens, self.sliced_mlp(packed, self._act, normed), gate)
        if rows is not None:
            updated = updated[: len(kept)]
        return _put_rows(flat, kept, updated).view(B, N, D)

    def mlp_of_top(self, x: Tensor, m: Modulation, packed: PackedBlock, logits: Tensor, k: int) -> Tensor:
        """The MLP's branch of the k tokens of each sample with the highest logits (B, N), added in place."""
        B, N, D = x.shape
        rows, flat = top_rows(logits, k), x.view(B * N, D)
        tokens = flat.index_select(0, rows).view(B, k, D)
        normed = modulate(self._norm(tokens), m.shift_mlp, m.scale_mlp)
        updated = add_gated(tokens, self.sliced_mlp(packed, self._act, normed), m.gate_mlp)
        return _put_rows(flat, rows, updated).view(B, N, D)

    @property
    def _norm(self) -> nn.Module:
        adapter, block, _ = self.parts
        return adapter.norms(block)[1]

    @property
    def _act(self) -> Callable[[Tensor], Tensor]:
        adapter, block, _ = self.parts
        return adapter.mlp(block).act


def top_rows(logits: Tensor, k: int) -> Tensor:
    """Rows (B·k,) in the flattened batch of the k tokens of each sample with the highest logits (B, N)."""
    B, N = logits.shape
    first = N * torch.arange(B, device=logits.device).unsqueeze(1)
    return (top_tokens(logits, k) + first).flatten()


def _put_rows(flat: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """flat (B·N, D) with ``tokens`` (…, D) at ``rows`` (K,), in place.

    Compiled, this stores what the kernel that makes the tokens gives; adding to the rows would take one value
    after another, atomically (float32), or memory of its own (bfloat16).
    """
    # Under autocast tokens are float32, as the residual is.
    return flat.index_copy_(0, rows, tokens.reshape(-1, flat.shape[1]).to(flat.dtype))


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
