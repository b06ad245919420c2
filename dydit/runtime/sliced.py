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
from dydit.routing.tokens import top_tokens
from dydit.runtime.packing import PackedBlock


def sliced_attention(packed: PackedBlock, x: Tensor) -> Tensor:
    """Self-attention of the active heads over x (B, N, D)."""
    B, N, D = x.shape
    if not packed.qkv:  # no head: what is left of the layer is the bias of its output projection
        bias = packed.out[1]
        return x.new_zeros(B, N, D) if bias is None else bias.expand(B, N, D)
    projected = [F.linear(x, *layer) for layer in packed.qkv]
    if len(projected) == 1:
        q, k, v = projected[0].view(B, N, 3, packed.heads, -1).permute(2, 0, 3, 1, 4)  # (B, h, N, d) each
    else:
        q, k, v = (p.view(B, N, packed.heads, -1).transpose(1, 2) for p in projected)
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

    def forward(
        self, x: Tensor, cond: Conditioning, packed: PackedBlock, capacity: int | None = None
    ) -> Tensor:
        """Tokens x (B, N, D) to tokens (B, N, D).

        Args:
            cond: the batch's conditioning.
            packed: the block's sliced weights.
            capacity: tokens of each sample that enter the MLP, highest scores first; None: those above
                the threshold.
        """
        x, m = self.attend(x, cond, packed)
        logits = self.token_logits(x)
        if logits is None or capacity == x.shape[1]:
            return self.mlp_of_all(x, m, packed)
        if capacity is None:
            return self.mlp_of_kept(x, m, packed, (logits.flatten() > self._token_logit).nonzero().squeeze(1))
        return self.mlp_of_top(x, m, packed, top_tokens(logits, capacity))

    def attend(self, x: Tensor, cond: Conditioning, packed: PackedBlock) -> tuple[Tensor, Modulation]:
        """The block up to its MLP: tokens (B, N, D), a tensor of its own, and the modulation."""
        adapter, block, _ = self._parts
        m = adapter.modulation(block, cond)
        normed = modulate(adapter.norms(block)[0](x), m.shift_attn, m.scale_attn)
        x = add_gated(x, self.sliced_attention(packed, normed), m.gate_attn)
        return adapter.cross(block, x, cond), m

    def token_logits(self, x: Tensor) -> Tensor | None:
        """Logits (B, N) of the token router; None without one."""
        router = self._parts[2]
        return None if router is None else router(x)

    def mlp_of_all(self, x: Tensor, m: Modulation, packed: PackedBlock) -> Tensor:
        """The MLP's branch of every token."""
        normed = modulate(self._norm(x), m.shift_mlp, m.scale_mlp)
        return add_gated(x, self.sliced_mlp(packed, self._act, normed), m.gate_mlp)

    def mlp_of_kept(self, x: Tensor, m: Modulation, packed: PackedBlock, index: Tensor) -> Tensor:
        """The MLP's branch of the tokens at ``index`` (K,) of the flattened batch, added to x in place.

        One gather for the whole batch; norm, modulation, MLP and gate see the kept tokens only.
        """
        B, N, D = x.shape
        if len(index) == B * N:
            return self.mlp_of_all(x, m, packed)
        if not len(index):
            return x
        sample = index // N
        shift, scale, gate = (
            None if row is None else row.index_select(0, sample)
            for row in (m.shift_mlp, None if m.scale_mlp is None else 1 + m.scale_mlp, m.gate_mlp)
        )  # (K, D) each
        flat = x.view(B * N, D)
        kept = self._norm(flat.index_select(0, index))
        if shift is not None and scale is not None:
            kept = torch.addcmul(shift, kept, scale)
        update = self.sliced_mlp(packed, self._act, kept)
        return _add_rows(flat, index, update if gate is None else update * gate).view(B, N, D)

    def mlp_of_top(self, x: Tensor, m: Modulation, packed: PackedBlock, index: Tensor) -> Tensor:
        """The MLP's branch of the tokens at ``index`` (B, k) of each sample, added to x in place."""
        B, N, D = x.shape
        if not index.shape[1]:
            return x
        rows = (index + N * torch.arange(B, device=index.device).unsqueeze(1)).flatten()  # (B·k,)
        flat = x.view(B * N, D)
        kept = self._norm(flat.index_select(0, rows).view(B, -1, D))
        update = self.sliced_mlp(packed, self._act, modulate(kept, m.shift_mlp, m.scale_mlp))
        update = update if m.gate_mlp is None else update * m.gate_mlp.unsqueeze(1)
        return _add_rows(flat, rows, update.view(-1, D)).view(B, N, D)

    @property
    def _norm(self) -> nn.Module:
        adapter, block, _ = self._parts
        return adapter.norms(block)[1]

    @property
    def _act(self) -> Callable[[Tensor], Tensor]:
        adapter, block, _ = self._parts
        return adapter.mlp(block).act


def _add_rows(flat: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    """flat (B·N, D) with ``update`` (K, D) added at ``rows`` (K,), each row once, in place."""
    # Under autocast the residual stays float32 while the branch is half, and index_add wants one dtype.
    return flat.index_add_(0, rows, update.to(flat.dtype))
