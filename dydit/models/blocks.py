"""Transformer blocks of the five conditioning designs, put together from the same few parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from dydit.costs import MODULATION_ROWS, has_affine_norms
from dydit.processor import HAS_AMX

NORM_EPS = 1e-6
# Numbers of rows, by dtype, for which the transposed product of adaLN's layer is the faster one.
TRANSPOSED = (
    {torch.float32: range(5, 17), torch.bfloat16: range(2, 17)} if HAS_AMX else {torch.float32: range(2, 5)}
)

_Conditioning = TypeVar("_Conditioning", bound="Conditioning")


@dataclass(frozen=True)
class Conditioning:
    """What the blocks are conditioned on.

    Attributes:
        timestep: timestep embedding (B, D); all that a width router may read.
        vector: timestep plus label embedding (B, D); None where the label enters as tokens.
        shared: modulation (B, 6, D) regressed once for all blocks (adaln_single), else None.
        context: tokens (B, M, D) that cross-attention reads, else None.
        context_mask: (B, 1, 1, M) bool, True where a context token counts; None = all.
        tokens: (B, M, D) that run behind those of the latents (in_context), else None.
    """

    timestep: Tensor
    vector: Tensor | None = None
    shared: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    tokens: Tensor | None = None

    def split(self: _Conditioning, samples: int) -> list[_Conditioning]:
        """Of so many samples each, as views."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = {name: tensor.split(samples) for name, tensor in given.items() if tensor is not None}
        return [
            replace(self, **dict(zip(parts, of_samples, strict=True)))
            for of_samples in zip(*parts.values(), strict=True)
        ]


class Modulation(NamedTuple):
    """Shift, scale and gate of the attention and of the MLP branch, each (B, D) or None."""

    shift_attn: Tensor | None = None
    scale_attn: Tensor | None = None
    gate_attn: Tensor | None = None
    shift_mlp: Tensor | None = None
    scale_mlp: Tensor | None = None
    gate_mlp: Tensor | None = None

    def split(self, samples: int) -> list[Modulation]:
        """Of so many samples each, as views."""
        count = len(next(row for row in self if row is not None)) // samples
        parts = ([None] * count if row is None else row.split(samples) for row in self)
        return [Modulation(*rows) for rows in zip(*parts, strict=True)]

    def for_tokens(self) -> Modulation:
        """The same as (B, 1, D), to broadcast over tokens, with 1 + scale for a scale."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = (
            None if row is None else row.unsqueeze(1) for row in self
        )
        scale_attn, scale_mlp = (None if scale is None else 1 + scale for scale in (scale_attn, scale_mlp))
        return Modulation(shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """x·(1 + scale) + shift over tokens x (B, N, D), with shift and scale (B, D) or None."""
    if shift is None or scale is None:
        return x
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def add_gated(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """Residual x + gate·branch over (B, N, D), with gate (B, D) or None."""
    if gate is None:
        return x + branch
    return torch.addcmul(x, gate.unsqueeze(1), branch)


class ModulationLinear(nn.Linear):
    """A linear layer with one row per sample; on the CPU, a few rows run by a faster product.

    With few rows the layer is a stream of weights. Some libraries read them far below the memory's speed, but
    not in the transposed product, weights first (``tools/measure_products.py``).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Rows x (B, D) to (B, out)."""
        if not _transposed(x):
            return super().forward(x)
        return self.columns(x).t().contiguous()

    def columns(self, x: Tensor) -> Tensor:
        """What rows x (B, D) give, transposed (out, B)."""
        return torch.addmm(self.bias.unsqueeze(1), self.weight, x.t())


def _transposed(x: Tensor) -> bool:
    """Whether the transposed product is the faster one for rows x."""
    if torch.compiler.is_compiling():  # for any number of rows
        return False
    return x.device.type == "cpu" and x.shape[0] in TRANSPOSED.get(x.dtype, ())


def rows_of_layers(layers: Sequence[Any], x: Tensor) -> Tensor:
    """Rows (L, B, out) that each of several ``ModulationLinear`` gives for x (B, D)."""
    if _transposed(x):  # few rows; to transpose each by itself would take longer
        return torch.stack([layer.columns(x) for layer in layers]).transpose(1, 2).contiguous()
    found = x.new_empty(len(layers), len(x), layers[0].out_features)
    for rows, layer in zip(found, layers, strict=True):
        rows.copy_(layer(x))  # of many rows, all at once would take memory twice
    return found


class CrossAttention(nn.Module):
    """Multi-head attention from the image tokens to context tokens."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from x (B, N, D) to context (B, M, D); mask (B, 1, 1, M) is True where a token counts."""
        B, N, D = x.shape
        q = self.q(x).view(B, N, self.num_heads, -1).transpose(1, 2)  # (B, H, N, d)
        k, v = self.kv(context).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, M, d)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(attended.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """One transformer block: attention, optional cross-attention, MLP, each on a residual.

    Args:
        hidden_size: D.
        num_heads: H.
        mlp_hidden: hidden units of the MLP.
        conditioning: design of the conditioning (``dydit.shapes.CONDITIONINGS``).
        mlp_norm_eps: epsilon of the MLP's layer norm (1e-6 in the DiT paper's models).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_hidden: int,
        conditioning: str,
        mlp_norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        affine = has_affine_norms(conditioning)
        self.norm1 = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=affine)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, eps=mlp_norm_eps, elementwise_affine=affine)
        self.mlp = Mlp(hidden_size, mlp_hidden, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.conditioning = conditioning
        if conditioning in MODULATION_ROWS:
            rows = MODULATION_ROWS[conditioning]
            self.adaLN_modulation = nn.Sequential(
                nn.SiLU(), ModulationLinear(hidden_size, rows * hidden_size)
            )
        if conditioning == "adaln_single":
            self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)
        if conditioning == "cross_attention":
            self.norm_cross = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        if conditioning in ("cross_attention", "adaln_single"):
            self.cross_attn = CrossAttention(hidden_size, num_heads)

    def modulation(self, cond: Conditioning) -> Modulation:
        """Shift, scale and gate of both branches, by the block's conditioning design."""
        if self.conditioning in MODULATION_ROWS:
            rows = MODULATION_ROWS[self.conditioning]
            return _of_rows(self.adaLN_modulation(cond.vector).chunk(rows, dim=1))
        if self.conditioning == "adaln_single":
            assert cond.shared is not None
            return Modulation(*(self.scale_shift_table + cond.shared).unbind(1))
        return Modulation()

    def cross(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Cross-attention on its residual; x (B, N, D) itself where the design has none."""
        if cond.context is None:
            return x
        query = self.norm_cross(x) if self.conditioning == "cross_attention" else x
        return x + self.cross_attn(query, cond.context, cond.context_mask)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Tokens x (B, N, D) to tokens (B, N, D)."""
        m = self.modulation(cond)
        x = add_gated(x, self.attn(modulate(self.norm1(x), m.shift_attn, m.scale_attn)), m.gate_attn)
        x = self.cross(x, cond)
        return add_gated(x, self.mlp(modulate(self.norm2(x), m.shift_mlp, m.scale_mlp)), m.gate_mlp)


def modulations(blocks: Sequence[Block], cond: Conditioning) -> list[Modulation]:
    """``Modulation.for_tokens`` of several blocks of one model at once, without gradients."""
    design = blocks[0].conditioning
    if design not in MODULATION_ROWS:
        return [block.modulation(cond).for_tokens() for block in blocks]
    assert cond.vector is not None
    rows = MODULATION_ROWS[design]
    layers = [block.adaLN_modulation[1] for block in blocks]
    found = rows_of_layers(layers, F.silu(cond.vector)).unflatten(2, (rows, 1, -1))  # (L, B, rows, 1, D)
    found[:, :, 1 :: rows // 2] += 1  # the scales, each after its shift
    return [_of_rows(of_block.unbind(1)) for of_block in found.unbind()]


def _of_rows(rows: Sequence[Tensor]) -> Modulation:
    """adaLN's six rows, or four, which have no gates."""
    if len(rows) == 6:
        return Modulation(*rows)
    shift_attn, scale_attn, shift_mlp, scale_mlp = rows
    return Modulation(shift_attn, scale_attn, None, shift_mlp, scale_mlp, None)


class FinalLayer(nn.Module):
    """Final (adaptive) layer norm and projection of each token to its P·P·C_out pixels."""

    def __init__(self, hidden_size: int, patch_outputs: int, conditioning: str) -> None:
        super().__init__()
        affine = has_affine_norms(conditioning)
        self.norm_final = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=affine)
        self.linear = nn.Linear(hidden_size, patch_outputs)
        self.conditioning = conditioning
        if conditioning in MODULATION_ROWS:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        if conditioning == "adaln_single":
            self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Tokens x (B, N, D) to patches (B, N, P·P·C_out)."""
        shift = scale = None
        if self.conditioning in MODULATION_ROWS:
            shift, scale = self.adaLN_modulation(cond.vector).chunk(2, dim=1)
        elif self.conditioning == "adaln_single":
            shift, scale = (self.scale_shift_table + cond.timestep.unsqueeze(1)).unbind(1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
