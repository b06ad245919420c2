"""Copies of the heads or groups that run, each in a slot: another mask copies only what it has more.

Which head or group lies in which slot does not change what a block computes, only how its sums round. So it
is decided by the schedule (``slot_orders``), not by what was there before: a subnetwork always gives the
same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dydit.adapters.base import AttentionParts, MlpParts
from dydit.processor import WITHOUT_ONEDNN
from dydit.runtime.packing import PackedAttention, PackedMlp, Weights, group_bytes, head_bytes, weights_of

Packing = PackedAttention | PackedMlp


class Slots:
    """Memory for copies of ``capacity`` components of a few tensors, and which of them it holds.

    Args:
        capacity: number of slots.
        component_bytes: memory that one component takes.
        copies: source (K, ...) with every component, and target (capacity, ...), for each tensor.
        packed: a packing of the first n slots.
    """

    def __init__(
        self,
        capacity: int,
        component_bytes: int,
        copies: Sequence[tuple[Tensor, Tensor]],
        packed: Callable[[int], Packing],
    ) -> None:
        self._component_bytes, self._copies, self._packed = component_bytes, copies, packed
        self._held = np.full(capacity, -1)

    @torch.no_grad()
    def fill(self, order: np.ndarray) -> tuple[Packing, int]:
        """The packing of components ``order`` (n,), the first in the first slot, and the bytes copied for it.

        Nothing may be reading the packing that was made before.
        """
        count = len(order)
        slots = np.flatnonzero(self._held[:count] != order)
        self._held[slots] = -1  # in case that the copy fails
        _copy(self._copies, order[slots], slots)
        self._held[slots] = order[slots]
        return self._packed(count), len(slots) * self._component_bytes


@torch.inference_mode(False)  # else they could not be filled outside of it
def attention_slots(parts: AttentionParts, capacity: int) -> Slots:
    """Slots for heads of an attention."""
    H, d = parts.num_heads, parts.out.in_features // parts.num_heads
    fused = len(parts.qkv) == 1
    layers = [_Rows(weights_of(layer), H, capacity, 3 if fused else 1) for layer in parts.qkv]
    out, size = _Columns(weights_of(parts.out), H, capacity), head_bytes(parts)

    def packed(n: int) -> PackedAttention:
        return PackedAttention(tuple(layer.first(n) for layer in layers), out.first(n), d, fused, n * size)

    copies = [*(pair for layer in layers for pair in layer.copies), *out.copies]
    return Slots(capacity, size, copies, packed)


@torch.inference_mode(False)  # else they could not be filled outside of it
def mlp_slots(parts: MlpParts, groups: int, capacity: int) -> Slots:
    """Slots for some of ``groups`` groups of an MLP."""
    fc1 = _Rows(weights_of(parts.fc1), groups, capacity)
    fc2, size = _Columns(weights_of(parts.fc2), groups, capacity), group_bytes(parts, groups)

    def packed(n: int) -> PackedMlp:
        return PackedMlp(fc1.first(n), fc2.first(n), n * size)

    return Slots(capacity, size, [*fc1.copies, *fc2.copies], packed)


def slot_orders(masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For masks (K,) in the order in which they come, the component in each slot (n,), with n active ones.

    A component stays where it lay for the mask before, as far as that is among the first n slots.
    """
    held: list[int] = []  # what lies in the slots, also in those behind the first n
    orders = []
    for mask in masks:
        missing = set(np.flatnonzero(mask).tolist())
        count, vacant = len(missing), []
        held += [-1] * (count - len(held))
        for slot in range(count):
            if held[slot] in missing:
                missing.remove(held[slot])
            else:
                vacant.append(slot)
        for slot, component in zip(vacant, sorted(missing), strict=True):
            held[slot] = component
        orders.append(np.array(held[:count], dtype=np.int64))
    return orders


class _Rows:
    """Rows of a layer by component; ``sections``: each component has rows in so many parts of the layer."""

    def __init__(self, layer: Weights, components: int, capacity: int, sections: int = 1) -> None:
        self.copies = []
        for tensor in (tensor for tensor in layer if tensor is not None):
            source = tensor.unflatten(0, (sections, components, -1)).movedim(1, 0)  # (K, sections, u, ...)
            self.copies.append((source, tensor.new_empty(capacity, *source.shape[1:])))

    def first(self, n: int) -> Weights:
        """Weight and bias of the first n slots."""
        weight, *bias = (target[:n].flatten(0, 2).data for _, target in self.copies)
        return weight, bias[0] if bias else None


class _Columns:
    """Columns of a layer by component, transposed. The bias is the layer's own.

    So that a component is one piece of memory, and the distance from one row to the next is always the same:
    oneDNN has, and keeps, a kernel for each distance. Not on a CPU without oneDNN's products of the dtype:
    PyTorch's own take transposed weights 16 times as long (``tools/measure_products.py``).
    """

    def __init__(self, layer: Weights, components: int, capacity: int) -> None:
        weight, self._bias = layer
        source = weight.unflatten(1, (components, -1)).permute(1, 2, 0)  # (K, u, out)
        if weight.device.type == "cpu" and weight.dtype in WITHOUT_ONEDNN:
            self._target = weight.new_empty(len(weight), capacity, source.shape[1]).permute(1, 2, 0)
        else:
            self._target = weight.new_empty(capacity, *source.shape[1:])
        self.copies = [(source, self._target)]

    def first(self, n: int) -> Weights:
        """Weight and bias of the first n slots."""
        return self._target[:n].flatten(0, 1).t().data, self._bias


def _copy(copies: Sequence[tuple[Tensor, Tensor]], components: np.ndarray, slots: np.ndarray) -> None:
    """Copy components of every source into slots of its target."""
    device = copies[0][0].device
    if device.type != "cuda":
        for component, slot in zip(components.tolist(), slots.tolist(), strict=True):
            for source, target in copies:
                target[slot].unsqueeze(0).copy_(_quick_to_copy(source[component]))
        return
    # One kernel for all components of one tensor; from pinned memory nothing waits for the indices. On a GPU
    # each mask has slots of its own (``SchedulePacks``), which are filled once, from the first to the last.
    where = torch.from_numpy(components).pin_memory().to(device, non_blocking=True)
    _select(copies, where)


def _select(copies: Sequence[tuple[Tensor, Tensor]], components: Tensor) -> None:
    """Copy components of every source into the first slots of its target."""
    for source, target in copies:
        torch.index_select(source, 0, components, out=target[: len(components)])


def _quick_to_copy(component: Tensor) -> Tensor:
    """The same as a stack of one, of rows that lie behind each other where it was transposed.

    torch would transpose a matrix in one thread, but a stack in all.
    """
    if component.ndim == 2 and component.stride(0) == 1:
        component = component.t().contiguous().t()
    return component.unsqueeze(0)
