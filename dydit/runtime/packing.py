"""Weights of one block cut down to the heads and groups that run.

What is all on is the original tensor, and what is one contiguous run is a view of it: these are made here.
The rest is a copy, made in ``dydit.runtime.slots``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from dydit.adapters.base import AttentionParts, MlpParts

Weights = tuple[Tensor, Tensor | None]  # of a linear layer: weight (out, in), bias (out,) where it has one


@dataclass(frozen=True)
class PackedAttention:
    """The attention's part of a ``PackedBlock``."""

    qkv: tuple[Weights, ...]
    out: Weights
    head_dim: int
    by_head: bool = False
    copied_bytes: int = 0


@dataclass(frozen=True)
class PackedMlp:
    """The MLP's part of a ``PackedBlock``."""

    fc1: Weights | None
    fc2: Weights
    copied_bytes: int = 0


@dataclass(frozen=True)
class PackedBlock:
    """Sliced weights of one block with h active heads and g active groups of u units.

    Attributes:
        qkv: one fused layer, weight (3·h·d, D), or three of (h·d, D); empty when no head is active.
        out: weight (D, h·d) and bias (D,).
        fc1: weight (g·u, D) and bias; None when no group is active.
        fc2: weight (D, g·u) and bias (D,).
        head_dim: d.
        by_head: whether a fused layer has q, k and v of one head after those of another; else all heads' q,
            then all their k, then all their v.
        copied_bytes: memory that the slices take beyond the original weights.
    """

    qkv: tuple[Weights, ...]
    out: Weights
    fc1: Weights | None
    fc2: Weights
    head_dim: int
    by_head: bool = False
    copied_bytes: int = 0

    @classmethod
    def of(cls, attention: PackedAttention, mlp: PackedMlp) -> PackedBlock:
        """The two parts together."""
        size = attention.copied_bytes + mlp.copied_bytes
        return cls(
            attention.qkv, attention.out, mlp.fc1, mlp.fc2, attention.head_dim, attention.by_head, size
        )


def view_attention(parts: AttentionParts, heads: np.ndarray) -> PackedAttention:
    """The attention for a head mask (H,) of one run: the weights themselves, or views of them."""
    first, count = _run(heads)
    H, d = parts.num_heads, parts.out.in_features // parts.num_heads
    layers = [weights_of(layer) for layer in parts.qkv]
    if count == 0:
        layers = []
    elif count < H:
        # Where q, k and v are one layer, their rows of these heads lie in three places.
        starts = [i * H for i in range(3)] if len(layers) == 1 else [0]
        layers = [
            (_narrow(weight, 0, (start + first) * d, count * d),
             None if bias is None else _narrow(bias, 0, (start + first) * d, count * d))
            for weight, bias in layers for start in starts
        ]  # fmt: skip
    weight, bias = weights_of(parts.out)
    return PackedAttention(tuple(layers), (_narrow(weight, 1, first * d, count * d), bias), d)


def view_mlp(parts: MlpParts, groups: np.ndarray) -> PackedMlp:
    """The MLP for a group mask (G,) of one run: the weights themselves, or views of them."""
    first, count = _run(groups)
    units = parts.fc1.out_features // len(groups)
    start, size = first * units, count * units
    (weight, bias), (weight2, bias2) = weights_of(parts.fc1), weights_of(parts.fc2)
    fc1 = _narrow(weight, 0, start, size), None if bias is None else _narrow(bias, 0, start, size)
    return PackedMlp(fc1 if count else None, (_narrow(weight2, 1, start, size), bias2))


def weights_of(layer: nn.Linear) -> Weights:
    """Weight and bias without gradients."""
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def tensors_of(packed: PackedAttention | PackedMlp) -> list[Tensor]:
    """All weights and biases of a packing."""
    if isinstance(packed, PackedAttention):
        layers = [*packed.qkv, packed.out]
    else:
        layers = [packed.fc2] if packed.fc1 is None else [packed.fc1, packed.fc2]
    return [tensor for layer in layers for tensor in layer if tensor is not None]


def without_the_rest(packed: PackedAttention | PackedMlp) -> PackedAttention | PackedMlp:
    """The packing with views of larger tensors copied, so that nothing else is saved along with it."""

    def own(layer: Weights) -> Weights:
        weight, bias = (
            t if t is None or t.nbytes == t.untyped_storage().nbytes() else t.clone() for t in layer
        )
        assert weight is not None
        return weight, bias

    if isinstance(packed, PackedAttention):
        return replace(packed, qkv=tuple(own(layer) for layer in packed.qkv), out=own(packed.out))
    return replace(packed, fc1=None if packed.fc1 is None else own(packed.fc1), fc2=own(packed.fc2))


def head_bytes(parts: AttentionParts) -> int:
    """Bytes that a copy of one head takes."""
    return _bytes([*_tensors(*parts.qkv), parts.out.weight]) // parts.num_heads


def group_bytes(parts: MlpParts, groups: int) -> int:
    """Bytes that a copy of one of ``groups`` groups takes."""
    return _bytes([*_tensors(parts.fc1), parts.fc2.weight]) // groups


def block_bytes(attention: AttentionParts, mlp: MlpParts) -> int:
    """Bytes of one block's own attention and MLP weights: the most that one packing can take."""
    return _bytes(_tensors(*attention.qkv, attention.out, mlp.fc1, mlp.fc2))


def _run(mask: np.ndarray) -> tuple[int, int]:
    """First component and number of components of a mask of one run, or none."""
    index = np.flatnonzero(mask)
    return (int(index[0]), len(index)) if len(index) else (0, 0)


def _narrow(tensor: Tensor, dim: int, start: int, size: int) -> Tensor:
    if size == tensor.shape[dim]:
        return tensor
    # .data forgets what it is a view of, which torch.compile would distinguish graphs by.
    return tensor.narrow(dim, start, size).data


def _tensors(*layers: nn.Linear) -> list[Tensor]:
    return [t for layer in layers for t in (layer.weight, layer.bias) if t is not None]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
