"""One block in its trained form: dense, with gates that multiply.

Where the gates sit decides that slicing computes the same: a head's gate multiplies its attention output
before the output projection; a group's gate multiplies its hidden units before the activation (act(0) = 0);
a token's gate multiplies what the MLP adds to it. Biases of the output projections stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit.adapters.base import Adapter, AttentionParts, MlpParts
from dydit.models.blocks import Conditioning, add_gated, modulate
from dydit.routing.routers import BlockRouters
from dydit.routing.tokens import top_gates


@dataclass(frozen=True)
class BlockGates:
    """What one block gets to know of its gates.

    Attributes:
        heads: gates (B, H); None = all on.
        groups: gates (B, G); None = all on.
        tokens: gates (B, N) to use; None: the token router decides.
        noise: of (B, N), for its decision in training, see ``BlockRouters.gate``.
        temperature: of that decision.
        capacity: tokens of each sample that enter the MLP, highest scores first, in place of those above the
            threshold.
        complete: every token enters the MLP, and the token router is not asked.
    """

    heads: Tensor | None = None
    groups: Tensor | None = None
    tokens: Tensor | None = None
    noise: Tensor | None = None
    temperature: Tensor | float | None = None
    capacity: int | None = None
    complete: bool = False


def masked_attention(parts: AttentionParts, x: Tensor, heads: Tensor | None) -> Tensor:
    """Self-attention over x (B, N, D) with head gates (B, H); None = all on.

    Gates are 0 or 1, so they may take the number format of what they multiply: under autocast a smaller one.
    """
    B, N, _ = x.shape
    projected = (
        torch.cat([layer(x) for layer in parts.qkv], dim=-1) if len(parts.qkv) > 1 else parts.qkv[0](x)
    )
    q, k, v = projected.view(B, N, 3, parts.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
    attended = F.scaled_dot_product_attention(q, k, v)
    if heads is not None:
        attended = attended * heads[:, :, None, None].to(attended.dtype)
    return parts.out(attended.transpose(1, 2).reshape(B, N, -1))


def masked_mlp(parts: MlpParts, x: Tensor, groups: Tensor | None) -> Tensor:
    """MLP over x (B, N, D) with group gates (B, G); None = all on."""
    hidden = parts.fc1(x)
    if groups is not None:
        gates = groups[:, None, :, None].to(hidden.dtype)
        hidden = (hidden.unflatten(-1, (groups.shape[1], -1)) * gates).flatten(-2)
    return parts.fc2(parts.act(hidden))


def masked_block(
    adapter: Adapter,
    block: Any,
    routers: BlockRouters,
    x: Tensor,
    cond: Conditioning,
    gates: BlockGates,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run one block on tokens x (B, N, D).

    Returns:
        The tokens (B, N, D); the token gates (B, N) that were used, None when complete; and the token
        router's logits (B, N), None where it did not run.
    """
    norm1, norm2 = adapter.norms(block)
    m = adapter.modulation(block, cond)
    attended = masked_attention(
        adapter.attention(block), modulate(norm1(x), m.shift_attn, m.scale_attn), gates.heads
    )
    x = adapter.cross(block, add_gated(x, attended, m.gate_attn), cond)
    tokens, logits = gates.tokens, None
    if not gates.complete and tokens is None:
        logits = routers.token_logits(x)
        if gates.capacity is None:
            tokens = routers.gate(logits, routers.config.token_threshold, gates.noise, gates.temperature)
        else:
            tokens = top_gates(logits, gates.capacity)
    update = masked_mlp(adapter.mlp(block), modulate(norm2(x), m.shift_mlp, m.scale_mlp), gates.groups)
    if tokens is not None:
        update = update * tokens.unsqueeze(-1).to(update.dtype)
    return add_gated(x, update, m.gate_mlp), tokens, logits
