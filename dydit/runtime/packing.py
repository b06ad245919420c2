"""Weights of one block cut down to the heads and groups that run.

What is all on is the original tensor; what is one contiguous run is a view of it; the rest is a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from dydit.adapters.base import AttentionParts, MlpParts

Weights = tuple[Tensor, Tensor | None]  # of a linear layer: weight (out, in), bias (out,) where it has one
New = Callable[[Tensor, tuple[int, ...]], Tensor]  # memory for a copy: of the kind of a tensor, of a shape


@dataclass(frozen=True)
class PackedAttention:
    """The attention's part of a ``PackedBlock``."""

    qkv: tuple[Weights, ...]
    out: Weights
    head_dim: int
    copied_bytes: int


@dataclass(frozen=True)
class PackedMlp:
    """The MLP's part of a ``PackedBlock``."""

    fc1: Weights | None
    fc2: Weights
    copied_bytes: int


@dataclass(frozen=True)
class PackedBlock:
    """Sliced weights of one block with h active heads and g active groups of u units.

    Attributes:
        qkv: one fused layer, weight (3·h·d, D), or three of (h·d, D); empty when no head is active.
        out: weight (D, h·d) and bias (D,).
        fc1: weight (g·u, D) and bias; None when no group is active.
        fc2: weight (D, g·u) and bias (D,).
        head_dim: d.
        copied_bytes: memory that the slices take beyond the original weights.
    """

    qkv: tuple[Weights, ...]
    out: Weights
    fc1: Weights | None
    fc2: Weights
    head_dim: int
    copied_bytes: int

    @classmethod
    def of(cls, attention: PackedAttention, mlp: PackedMlp) -> PackedBlock:
        """The two parts together."""
        size = attention.copied_bytes + mlp.copied_bytes
        return cls(attention.qkv, attention.out, mlp.fc1, mlp.fc2, attention.head_dim, size)


def tensors_of(packed: PackedAttention | PackedMlp) -> list[Tensor]:
    """All weights and biases of a packing."""
    if isinstance(packed, PackedAttention):
        layers = [*packed.qkv, packed.out]
    else:
        layers = [packed.fc2] if packed.fc1 is None else [packed.fc1, packed.fc2]
    return [tensor for layer in layers for tensor in layer if tensor is not None]


def pack_block(
    attention: AttentionParts, mlp: MlpParts, heads: np.ndarray, groups: np.ndarray
) -> PackedBlock:
    """Slice one block's weights for head mask (H,) and group mask (G,), both bool."""
    return PackedBlock.of(pack_attention(attention, heads), pack_mlp(mlp, groups))


@torch.no_grad()
def pack_attention(parts: AttentionParts, heads: np.ndarray, new: New = Tensor.new_empty) -> PackedAttention:
    """Slice the attention's weights for head mask (H,), bool; ``new`` gives the copies their memory."""
    index, head_dim = np.flatnonzero(heads), parts.out.in_features // parts.num_heads
    qkv = _pack_qkv(parts, index, head_dim, new) if len(index) else ()
    out = take(parts.out.weight, index, head_dim, 1, new), _detached(parts.out.bias)
    packed = PackedAttention(qkv, out, head_dim, copied_bytes=0)
    return replace(packed, copied_bytes=_copied(packed, [*parts.qkv, parts.out]))


@torch.no_grad()
def pack_mlp(parts: MlpParts, groups: np.ndarray, new: New = Tensor.new_empty) -> PackedMlp:
    """Slice the MLP's weights for group mask (G,), bool; ``new`` gives the copies their memory."""
    index, units = np.flatnonzero(groups), parts.fc1.out_features // len(groups)
    fc1 = _take_rows(_detached_pair(parts.fc1), index, units, new) if len(index) else None
    fc2 = take(parts.fc2.weight, index, units, 1, new), _detached(parts.fc2.bias)
    packed = PackedMlp(fc1, fc2, copied_bytes=0)
    return replace(packed, copied_bytes=_copied(packed, [parts.fc1, parts.fc2]))


def attention_bytes(parts: AttentionParts, heads: np.ndarray) -> int:
    """``copied_bytes`` of ``pack_attention``, without making it."""
    return _bytes_of_copies([*_tensors(*parts.qkv), parts.out.weight], heads)


def mlp_bytes(parts: MlpParts, groups: np.ndarray) -> int:
    """``copied_bytes`` of ``pack_mlp``, without making it."""
    return _bytes_of_copies([*_tensors(parts.fc1), parts.fc2.weight], groups)


def block_bytes(attention: AttentionParts, mlp: MlpParts) -> int:
    """Bytes of one block's own attention and MLP weights: the most that one packing can take."""
    return sum(t.nbytes for t in _tensors(*attention.qkv, attention.out, mlp.fc1, mlp.fc2))


def _bytes_of_copies(tensors: Sequence[Tensor], mask: np.ndarray) -> int:
    if mask.all() or not mask.any() or _is_run(np.flatnonzero(mask)):
        return 0
    return sum(tensor.nbytes for tensor in tensors) * int(mask.sum()) // len(mask)


def _copied(packed: PackedAttention | PackedMlp, layers: Sequence[nn.Linear]) -> int:
    """Bytes of the slices that lie in other memory than the layers."""
    originals = {tensor.untyped_storage().data_ptr() for tensor in _tensors(*layers)}
    return sum(t.nbytes for t in tensors_of(packed) if t.untyped_storage().data_ptr() not in originals)


def _pack_qkv(parts: AttentionParts, heads: np.ndarray, head_dim: int, new: New) -> tuple[Weights, ...]:
    """Rows of q, k and v of the active heads.

    Where the model fuses the three, they stay so, unless one run of heads makes views of them.
    """
    layers = [_detached_pair(layer) for layer in parts.qkv]
    if len(heads) == parts.num_heads:
        return tuple(layers)
    if len(layers) == 3:
        return tuple(_take_rows(layer, heads, head_dim, new) for layer in layers)
    sections = [i * parts.num_heads + heads for i in range(3)]  # q, k, v
    together = [np.concatenate(sections)] if not _is_run(heads) else sections
    return tuple(_take_rows(layers[0], index, head_dim, new) for index in together)


def _take_rows(layer: Weights, index: np.ndarray, size: int, new: New) -> Weights:
    weight, bias = layer
    return take(weight, index, size, 0, new), None if bias is None else take(bias, index, size, 0, new)


def take(tensor: Tensor, index: np.ndarray, size: int, dim: int, new: New = Tensor.new_empty) -> Tensor:
    """The components at ``index`` (ascending), of ``size`` each along ``dim``.

    The tensor itself where that is all of them, a view where they are one run, else a copy. It copies
    component by component: on the CPU faster than column by column (``tools/measure_products.py``).
    """
    tensor = tensor.detach()
    if len(index) * size == tensor.shape[dim]:
        return tensor
    if _is_run(index):
        # .data forgets what it is a view of, which torch.compile would distinguish graphs by.
        return tensor.narrow(dim, int(index[0]) * size, len(index) * size).data
    where = torch.from_numpy(index)
    if tensor.is_cuda:  # from pinned memory nothing waits for the copy
        where = where.pin_memory()
    where = where.to(tensor.device, non_blocking=True)
    components = tensor.unflatten(dim, (-1, size))
    if torch.jit.is_tracing():  # which fvcore counts by, and which knows no ``out``
        return components.index_select(dim, where).flatten(dim, dim + 1)
    copy = new(tensor, (*tensor.shape[:dim], len(index), *components.shape[dim + 1 :]))
    return torch.index_select(components, dim, where, out=copy).flatten(dim, dim + 1)


def _is_run(index: np.ndarray) -> bool:
    return len(index) > 0 and index[-1] - index[0] + 1 == len(index)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _detached_pair(layer: nn.Linear) -> Weights:
    return layer.weight.detach(), _detached(layer.bias)


def _tensors(*layers: nn.Linear) -> list[Tensor]:
    return [t for layer in layers for t in (layer.weight, layer.bias) if t is not None]
