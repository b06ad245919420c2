"""Order heads and MLP channels by weight magnitude, without changing the function.

DyDiT keeps the most important head and channel group of every block always on; after this permutation
those are the first ones (Zhao et al., section 3.3, always-on components).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dydit.adapters.base import Adapter, AttentionParts, MlpParts


def head_magnitudes(parts: AttentionParts) -> Tensor:
    """L1 magnitude (H,) of each head's query, key, value rows and output columns, in float64."""
    columns = parts.out.weight.detach().double().unflatten(1, (parts.num_heads, -1))  # (D, H, d)
    magnitudes = columns.abs().sum(dim=(0, 2))
    for layer in parts.qkv:
        magnitudes += by_head(layer.weight.detach().double(), parts).abs().sum(dim=(0, 2, 3))
    return magnitudes


def by_head(rows: Tensor, parts: AttentionParts) -> Tensor:
    """Weight (s·H·d, D) or bias (s·H·d,) of a q, k, v or fused layer as (s, H, d, …)."""
    return rows.unflatten(0, (3 // len(parts.qkv), parts.num_heads, -1))


def channel_magnitudes(parts: MlpParts) -> Tensor:
    """L1 magnitude (hidden,) of each hidden channel's input row and output column, in float64."""
    rows = parts.fc1.weight.detach().double().abs().sum(dim=1)
    return rows + parts.fc2.weight.detach().double().abs().sum(dim=0)


@torch.no_grad()
def permute_heads(parts: AttentionParts, order: Tensor) -> None:
    """Reorder the heads in place: new head i is old head ``order[i]``."""
    for layer in parts.qkv:
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                tensor.copy_(by_head(tensor, parts)[:, order].reshape(tensor.shape))
    weight = parts.out.weight
    weight.copy_(weight.unflatten(1, (parts.num_heads, -1))[:, order].reshape(weight.shape))


@torch.no_grad()
def permute_channels(parts: MlpParts, order: Tensor) -> None:
    """Reorder the hidden channels in place: new channel i is old channel ``order[i]``.

    With fewer numbers than channels, whole groups of equal size are reordered.
    """
    groups = (len(order), -1)
    for tensor in (parts.fc1.weight, parts.fc1.bias):
        if tensor is not None:
            tensor.copy_(tensor.unflatten(0, groups)[order].flatten(0, 1))
    weight = parts.fc2.weight
    weight.copy_(weight.unflatten(1, groups)[:, order].flatten(1, 2))


def permute_by_importance(adapter: Adapter, model: torch.nn.Module) -> None:
    """Put the heads and channels of every block in descending order of magnitude, in place.

    The model's function does not change. Ties keep their order, so a second call changes nothing.
    """
    for block in adapter.blocks(model):
        attention, mlp = adapter.attention(block), adapter.mlp(block)
        permute_heads(attention, head_magnitudes(attention).argsort(descending=True, stable=True))
        permute_channels(mlp, channel_magnitudes(mlp).argsort(descending=True, stable=True))
