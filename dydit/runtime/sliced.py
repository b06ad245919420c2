"""One block in its deployed form: sliced weights, gathered tokens; the twin of ``dynamic.masked``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit.adapters.base import Adapter
from dydit.models.blocks import Conditioning, Modulation, add_gated, modulate
from dydit.routing.gates import logit
from dydit.runtime.packing import PackedBlock


def sliced_attention(packed: PackedBlock, x: Tensor) -> Tensor:
    """Self-attention of the active heads over x (B, N, D)."""
    B, N, D = x.shape
    if packed.qkv is None:  # no head: what is left of the layer is the bias of its output projection
        bias = packed.out[1]
        return x.new_zeros(B, N, D) if bias is None else bias.expand(B, N, D)
    q, k, v = F.linear(x, *packed.qkv).view(B, N, 3, packed.heads, -1).permute(2, 0, 3, 1, 4)  # (B, h, N, d)
    attended = F.scaled_dot_product_attention(q, k, v)
    return F.linear(attended.transpose(1, 2).reshape(B, N, -1), *packed.out)


def sliced_mlp(packed: PackedBlock, act: Any, x: Tensor) -> Tensor:
    """MLP of the active groups over x (..., D)."""
    if packed.fc1 is None:
        bias = packed.fc2[1]
        return torch.zeros_like(x) if bias is None else bias.expand_as(x)
    return F.linear(act(F.linear(x, *packed.fc1)), *packed.fc2)


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
    """

    def __init__(
        self, adapter: Adapter, block: nn.Module, token_router: nn.Module | None, token_threshold: float
    ) -> None:
        super().__init__()
        self._parts = (adapter, block, token_router)  # a tuple, so that nothing is registered twice
        self._token_logit = logit(token_threshold)
        self.sliced_attention, self.sliced_mlp = Named(sliced_attention), Named(sliced_mlp)

    def forward(self, x: Tensor, cond: Conditioning, packed: PackedBlock) -> Tensor:
        """Tokens x (B, N, D) to tokens (B, N, D)."""
        adapter, block, _ = self._parts
        m = adapter.modulation(block, cond)
        normed = modulate(adapter.norms(block)[0](x), m.shift_attn, m.scale_attn)
        x = add_gated(x, self.sliced_attention(packed, normed), m.gate_attn)
        return self._mlp(adapter.cross(block, x, cond), m, packed)

    def _mlp(self, x: Tensor, m: Modulation, packed: PackedBlock) -> Tensor:
        """MLP on the kept tokens of the whole batch: gather, norm, modulate, MLP, gate, scatter."""
        adapter, block, router = self._parts
        norm, act = adapter.norms(block)[1], adapter.mlp(block).act
        B, N, D = x.shape
        flat = x.reshape(B * N, D)
        index = None if router is None else (router(flat) > self._token_logit).nonzero().squeeze(1)  # (K,)
        if index is None or len(index) == B * N:
            update = self.sliced_mlp(packed, act, modulate(norm(x), m.shift_mlp, m.scale_mlp))
            return add_gated(x, update, m.gate_mlp)
        if not len(index):
            return x
        shift, scale, gate = _rows(index // N, m.shift_mlp, m.scale_mlp, m.gate_mlp)  # (K, D) each
        kept = norm(flat.index_select(0, index))
        if shift is not None and scale is not None:
            kept = torch.addcmul(shift, kept, 1 + scale)
        update = self.sliced_mlp(packed, act, kept)
        update = update if gate is None else gate * update
        # Under autocast the residual stays float32 while the branch is half, and index_add wants one dtype.
        return flat.index_add(0, index, update.to(flat.dtype)).view(B, N, D)


def _rows(sample: Tensor, *modulations: Tensor | None) -> list[Tensor | None]:
    """Each modulation (B, D) at the sample (K,) of every kept token."""
    return [None if m is None else m.index_select(0, sample) for m in modulations]
