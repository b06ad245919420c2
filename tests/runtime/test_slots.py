"""Copies of heads and groups in slots: what a mask needs is there, whatever was there before."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from core_builders import small_dit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dydit.adapters.base import AttentionParts, MlpParts
from dydit.adapters.dit import DiTAdapter
from dydit.runtime import slots as slots_module
from dydit.runtime.packing import PackedAttention, PackedMlp, group_bytes, head_bytes, tensors_of
from dydit.runtime.slots import attention_slots, mlp_slots, slot_orders

H, G, D = 4, 8, 32

masks = st.lists(
    st.lists(st.booleans(), min_size=G, max_size=G).filter(any).map(np.array), min_size=1, max_size=8
)


def parts() -> tuple[AttentionParts, MlpParts]:
    block = small_dit().blocks[0]
    return DiTAdapter().attention(block), DiTAdapter().mlp(block)


def separate(attention: AttentionParts) -> AttentionParts:
    """The same attention with three layers for q, k and v, where it has one."""
    layers = tuple(nn.Linear(D, D) for _ in range(3))
    (fused,) = attention.qkv
    with torch.no_grad():
        for layer, weight, bias in zip(layers, fused.weight.split(D), fused.bias.split(D), strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    return AttentionParts(layers, attention.out, H)


@given(masks)
def test_an_order_holds_the_mask_and_moves_as_little_as_it_can(sequence: list[np.ndarray]) -> None:
    held: dict[int, int] = {}  # slot -> component
    for mask, order in zip(sequence, slot_orders(sequence), strict=True):
        assert sorted(order) == np.flatnonzero(mask).tolist()
        stay = {slot: c for slot, c in held.items() if slot < len(order) and mask[c]}
        kept = set(stay.values())  # a component may lie in two slots, one of them behind the last mask's
        moved = [slot for slot, c in enumerate(order) if held.get(slot) != c]
        assert len(moved) == len(order) - len(kept)
        held |= dict(enumerate(order.tolist()))


def test_orders_by_hand() -> None:
    def on(*components: int) -> np.ndarray:
        return np.isin(np.arange(6), components)

    sequence = [on(0, 2, 5), on(0, 3, 5), on(0, 5), on(1, 3, 4, 5)]
    expected = [[0, 2, 5], [0, 3, 5], [0, 5], [1, 5, 3, 4]]
    assert [order.tolist() for order in slot_orders(sequence)] == expected


@given(masks, st.randoms(use_true_random=False))
def test_groups_in_slots_are_those_of_the_mask(sequence: list[np.ndarray], random: Random) -> None:
    _, mlp = parts()
    orders = slot_orders(sequence)
    slots = mlp_slots(mlp, G, max(len(order) for order in orders))
    calls = [*orders, *orders]
    random.shuffle(calls)
    for order in calls:
        packed, _ = slots.fill(order)
        assert isinstance(packed, PackedMlp) and packed.fc1 is not None and packed.fc1[1] is not None
        fc1, fc2 = mlp.fc1.weight.unflatten(0, (G, -1)), mlp.fc2.weight.unflatten(1, (G, -1))
        assert torch.equal(packed.fc1[0], fc1[order].flatten(0, 1))
        assert torch.equal(packed.fc1[1], mlp.fc1.bias.unflatten(0, (G, -1))[order].flatten())
        assert torch.equal(packed.fc2[0], fc2[:, order].flatten(1))
        assert packed.fc2[1] is not None and torch.equal(packed.fc2[1], mlp.fc2.bias)
        assert packed.copied_bytes == len(order) * group_bytes(mlp, G)


@pytest.mark.parametrize("without", [[], [torch.float32]])
def test_columns_are_transposed_where_products_take_that(
    without: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "WITHOUT_ONEDNN", without)
    attention, mlp = parts()
    heads, _ = attention_slots(attention, H).fill(np.array([2, 0]))
    groups, _ = mlp_slots(mlp, G, G).fill(np.array([5, 0, 1]))
    assert isinstance(heads, PackedAttention) and isinstance(groups, PackedMlp)
    assert torch.equal(heads.out[0], attention.out.weight.unflatten(1, (H, -1))[:, [2, 0]].flatten(1))
    assert torch.equal(groups.fc2[0], mlp.fc2.weight.unflatten(1, (G, -1))[:, [5, 0, 1]].flatten(1))
    for weight, _ in (heads.out, groups.fc2):
        assert weight.stride(1 if without else 0) == 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("order", [[2, 0], [3], [1, 3, 0, 2]])
def test_heads_in_slots_are_those_of_the_mask(fused: bool, order: list[int]) -> None:
    attention, _ = parts()
    layer = attention.qkv[0]
    weight, bias = (
        t.unflatten(0, (3, H, -1))[:, order] for t in (layer.weight, layer.bias)
    )  # (3, h, d, ...)
    slots = attention_slots(attention if fused else separate(attention), H)
    packed, copied = slots.fill(np.array(order))
    assert isinstance(packed, PackedAttention) and packed.by_head == fused
    size = len(order) * head_bytes(attention)
    assert copied == packed.copied_bytes == size

    def by_part(tensors: list[Tensor | None]) -> Tensor:
        if fused:  # q, k and v of one head lie together
            assert tensors[0] is not None
            return tensors[0].unflatten(0, (len(order), 3, -1)).transpose(0, 1)
        return torch.stack([t.unflatten(0, (len(order), -1)) for t in tensors if t is not None])

    assert torch.equal(by_part([w for w, _ in packed.qkv]), weight)
    assert torch.equal(by_part([b for _, b in packed.qkv]), bias)
    assert torch.equal(packed.out[0], attention.out.weight.unflatten(1, (H, -1))[:, order].flatten(1))


def test_the_next_mask_copies_what_it_has_more() -> None:
    _, mlp = parts()
    slots, size = mlp_slots(mlp, G, 5), group_bytes(mlp, G)
    copied = [slots.fill(np.array(order))[1] for order in ([0, 2, 4], [0, 3, 4], [0, 3], [0, 3, 4, 7, 6])]
    assert copied == [3 * size, size, 0, 2 * size]  # group 4 still lay in its slot


def test_memory_is_that_of_the_capacity() -> None:
    attention, mlp = parts()
    for slots in (
        attention_slots(attention, 3),
        attention_slots(separate(attention), 3),
        mlp_slots(mlp, G, 3),
    ):
        packed, _ = slots.fill(np.arange(3))
        biases = packed.out[1] if isinstance(packed, PackedAttention) else packed.fc2[1]
        copies = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(packed)}
        assert biases is not None and copies.pop(biases.untyped_storage().data_ptr())  # the layer's own
        assert sum(copies.values()) == packed.copied_bytes


def test_a_failed_copy_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _, mlp = parts()
    slots = mlp_slots(mlp, G, 2)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Tensor, "copy_", lambda *_: (_ for _ in ()).throw(MemoryError()))
        slots.fill(np.array([1, 3]))
    packed, copied = slots.fill(np.array([1, 3]))
    assert isinstance(packed, PackedMlp) and copied == 2 * group_bytes(mlp, G)
    assert torch.equal(packed.fc2[0], mlp.fc2.weight.unflatten(1, (G, -1))[:, [1, 3]].flatten(1))


def test_one_kernel_copies_what_a_loop_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does, with the memory of the slots and of weights as they are."""
    attention, mlp = parts()

    def in_one(copies: Any, components: np.ndarray, places: np.ndarray) -> None:
        assert places.tolist() == list(range(len(order)))
        slots_module._select(copies, torch.from_numpy(components))

    order = np.array([3, 0, 2])
    for make in (
        partial(attention_slots, attention, 3),
        partial(attention_slots, separate(attention), 3),
        partial(mlp_slots, mlp, G, 3),
    ):
        expected, _ = make().fill(order)
        with monkeypatch.context() as gpu:
            gpu.setattr(slots_module, "_copy", in_one)
            seen, _ = make().fill(order)
        assert all(map(torch.equal, tensors_of(seen), tensors_of(expected)))


def test_slots_made_in_inference_mode_are_filled_outside_of_it() -> None:
    _, mlp = parts()
    with torch.inference_mode():
        slots = mlp_slots(mlp, G, 2)
        slots.fill(np.array([1, 3]))
    packed, _ = slots.fill(np.array([1, 4]))
    assert isinstance(packed, PackedMlp)
    assert torch.equal(packed.fc2[0], mlp.fc2.weight.unflatten(1, (G, -1))[:, [1, 4]].flatten(1))
