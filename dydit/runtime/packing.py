"""Weights of one block cut down to the heads and groups that run.

What is all on is the original tensor; what is one contiguous run is a view of it; the rest is one copy
per distinct subnetwork, kept under a budget of bytes (least recently used leaves first).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dydit.adapters.base import AttentionParts, MlpParts
from dydit.errors import ConfigError


@dataclass(frozen=True)
class PackedBlock:
    """Sliced weights of one block with h active heads and g active groups of u units.

    Attributes:
        qkv: weight (3·h·d, D) and bias; None when no head is active.
        out: weight (D, h·d) and bias (D,).
        fc1: weight (g·u, D) and bias; None when no group is active.
        fc2: weight (D, g·u) and bias (D,).
        heads: h.
        copied_bytes: memory that the slices take beyond the original weights.
    """

    qkv: tuple[Tensor, Tensor | None] | None
    out: tuple[Tensor, Tensor | None]
    fc1: tuple[Tensor, Tensor | None] | None
    fc2: tuple[Tensor, Tensor | None]
    heads: int
    copied_bytes: int


@torch.no_grad()
def pack_block(
    attention: AttentionParts, mlp: MlpParts, heads: np.ndarray, groups: np.ndarray
) -> PackedBlock:
    """Slice one block's weights for head mask (H,) and group mask (G,), both bool."""
    head_index = np.flatnonzero(heads)
    head_dim = attention.out.in_features // attention.num_heads
    unit_index = _units(np.flatnonzero(groups), mlp.fc1.out_features // len(groups))
    qkv = _pack_qkv(attention, head_index) if len(head_index) else None
    fc1 = None
    if len(unit_index):
        bias = _detached(mlp.fc1.bias)
        fc1 = (_take(mlp.fc1.weight, unit_index, 0), None if bias is None else _take(bias, unit_index, 0))
    out = _take(attention.out.weight, _units(head_index, head_dim), 1)
    fc2 = _take(mlp.fc2.weight, unit_index, 1)
    originals = {t.untyped_storage().data_ptr() for t in _originals(attention, mlp)}
    slices = [out, fc2, *(qkv or ()), *(fc1 or ())]
    return PackedBlock(
        qkv=qkv,
        out=(out, _detached(attention.out.bias)),
        fc1=fc1,
        fc2=(fc2, _detached(mlp.fc2.bias)),
        heads=len(head_index),
        copied_bytes=sum(
            t.nbytes for t in slices if t is not None and t.untyped_storage().data_ptr() not in originals
        ),
    )


def block_bytes(attention: AttentionParts, mlp: MlpParts) -> int:
    """Bytes of one block's own attention and MLP weights: the most that one packing can take."""
    return sum(t.nbytes for t in _originals(attention, mlp))


def _pack_qkv(parts: AttentionParts, head_index: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """Rows of the active heads, fused into one (3·h·d, D) weight whatever the layout of the source."""
    if len(head_index) == parts.num_heads and len(parts.qkv) == 1:
        return parts.qkv[0].weight.detach(), _detached(parts.qkv[0].bias)
    index = torch.as_tensor(head_index, device=parts.out.weight.device)

    def rows(tensors: Sequence[Tensor]) -> Tensor:
        sections = [t.unflatten(0, (3 // len(tensors), parts.num_heads, -1))[:, index] for t in tensors]
        return torch.cat(sections).flatten(0, 2)

    biases = [layer.bias for layer in parts.qkv]
    weight = rows([layer.weight for layer in parts.qkv])
    return weight, None if biases[0] is None else rows(biases)


def _units(index: np.ndarray, size: int) -> np.ndarray:
    """Positions of the members of groups of ``size``."""
    return (index[:, None] * size + np.arange(size)).reshape(-1)


def _take(tensor: Tensor, index: np.ndarray, dim: int) -> Tensor:
    """``tensor`` at ``index`` (ascending) along ``dim``: itself, a view of a contiguous run, or a copy."""
    tensor = tensor.detach()
    if len(index) == tensor.shape[dim]:
        return tensor
    if len(index) and index[-1] - index[0] + 1 == len(index):
        return tensor.narrow(dim, int(index[0]), len(index))
    return tensor.index_select(dim, torch.as_tensor(index, device=tensor.device))


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _originals(attention: AttentionParts, mlp: MlpParts) -> list[Tensor]:
    layers = [*attention.qkv, attention.out, mlp.fc1, mlp.fc2]
    return [t for layer in layers for t in (layer.weight, layer.bias) if t is not None]


@dataclass(frozen=True)
class PackStatistics:
    """Counters of a cache: requests served from it, packings made, bytes held, entries dropped."""

    hits: int
    misses: int
    bytes: int
    evictions: int


class PackCache:
    """Packed blocks by key, least recently used out first, never above ``budget`` bytes of copies.

    Safe for several threads: a packing in use stays alive through its reference.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: OrderedDict[Hashable, PackedBlock] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = self._bytes = self._evictions = 0

    def get(self, key: Hashable, make: Callable[[], PackedBlock]) -> PackedBlock:
        """The packing under ``key``, made by ``make`` on a miss."""
        with self._lock:
            if key in self._entries:
                self._hits += 1
                self._entries.move_to_end(key)
                return self._entries[key]
            self._misses += 1
            packed = make()
            self._entries[key] = packed
            self._bytes += packed.copied_bytes
            while self._bytes > self.budget:
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= dropped.copied_bytes
                self._evictions += 1
            return packed

    def clear(self) -> None:
        """Forget every packing; the counters go on."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def statistics(self) -> PackStatistics:
        """Counters so far."""
        with self._lock:
            return PackStatistics(self._hits, self._misses, self._bytes, self._evictions)


def check_budget(budget: int, largest: int) -> None:
    """Refuse a budget that one packed block can exceed.

    Raises:
        ConfigError: says how many bytes a block takes.
    """
    if budget < largest:
        raise ConfigError(
            f"memory budget of {budget} bytes",
            expected=f"at least one block's {largest} bytes",
            remedy="raise the budget or leave it at its default",
        )
