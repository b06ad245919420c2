from __future__ import annotations

import numpy as np
import pytest
import torch
from core_builders import small_dit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dydit.adapters.base import AttentionParts, MlpParts
from dydit.adapters.dit import DiTAdapter
from dydit.runtime.packing import (
    attention_bytes,
    block_bytes,
    mlp_bytes,
    pack_attention,
    pack_block,
    pack_mlp,
)

H, G, D = 4, 8, 32


def parts() -> tuple[AttentionParts, MlpParts]:
    block = small_dit().blocks[0]
    return DiTAdapter().attention(block), DiTAdapter().mlp(block)


def mask(length: int, *on: int) -> np.ndarray:
    return np.isin(np.arange(length), on)


def shares_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def test_everything_on_is_the_weights_themselves() -> None:
    attention, mlp = parts()
    packed = pack_block(attention, mlp, np.ones(H, bool), np.ones(G, bool))
    assert packed.copied_bytes == 0 and packed.head_dim == D // H
    assert len(packed.qkv) == 1 and packed.fc1 is not None
    for tensor, original in (
        (packed.qkv[0][0], attention.qkv[0].weight),
        (packed.qkv[0][1], attention.qkv[0].bias),
        (packed.out[0], attention.out.weight),
        (packed.fc1[0], mlp.fc1.weight),
        (packed.fc1[1], mlp.fc1.bias),
        (packed.fc2[0], mlp.fc2.weight),
    ):
        assert tensor is not None and tensor.data_ptr() == original.data_ptr()
        assert not tensor.requires_grad


def test_one_run_of_heads_and_of_groups_is_a_view() -> None:
    attention, mlp = parts()
    packed = pack_block(attention, mlp, mask(H, 1, 2), mask(G, 2, 3, 4))
    assert packed.fc1 is not None and packed.fc1[1] is not None and packed.copied_bytes == 0
    assert shares_storage(packed.fc1[0], mlp.fc1.weight)
    assert shares_storage(packed.fc1[1], mlp.fc1.bias)
    assert shares_storage(packed.fc2[0], mlp.fc2.weight)
    assert shares_storage(packed.out[0], attention.out.weight)
    # The heads' rows lie in three places (q, k, v): three views.
    assert len(packed.qkv) == 3
    assert all(shares_storage(weight, attention.qkv[0].weight) for weight, _ in packed.qkv)


def test_scattered_groups_are_a_copy_of_just_those() -> None:
    attention, mlp = parts()
    packed = pack_block(attention, mlp, np.ones(H, bool), mask(G, 0, 2))
    assert packed.fc1 is not None and packed.fc1[1] is not None
    rows = [*range(0, 16), *range(32, 48)]  # groups 0 and 2 of 16 units each
    assert torch.equal(packed.fc1[0], mlp.fc1.weight[rows])
    assert torch.equal(packed.fc1[1], mlp.fc1.bias[rows])
    assert torch.equal(packed.fc2[0], mlp.fc2.weight[:, rows])
    assert packed.copied_bytes == 4 * len(rows) * (D + 1 + D)


@given(st.lists(st.booleans(), min_size=H, max_size=H), st.booleans())
def test_heads_are_sliced_alike_from_fused_and_separate_layers(on: list[bool], bias: bool) -> None:
    torch.manual_seed(0)
    fused, out = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, D)
    separate = [nn.Linear(D, D, bias=bias) for _ in range(3)]
    with torch.no_grad():
        for layer, rows in zip(separate, fused.weight.split(D), strict=True):
            layer.weight.copy_(rows)
        if bias:
            for layer, part in zip(separate, fused.bias.split(D), strict=True):
                layer.bias.copy_(part)
    _, mlp = parts()
    ours, theirs = (
        pack_block(AttentionParts(layers, out, H), mlp, np.array(on), np.ones(G, bool))
        for layers in ((fused,), tuple(separate))
    )
    assert bool(ours.qkv) == bool(theirs.qkv) == any(on)
    if not any(on):
        return
    index = np.flatnonzero(on)
    expected = fused.weight.unflatten(0, (3, H, -1))[:, index].flatten(0, 2)
    for packed in (ours, theirs):
        assert torch.equal(torch.cat([weight for weight, _ in packed.qkv]), expected)
        assert all((b is not None) == bias for _, b in packed.qkv)
    if bias:
        expected_bias = fused.bias.unflatten(0, (3, H, -1))[:, index].flatten()
        for packed in (ours, theirs):
            assert torch.equal(torch.cat([b for _, b in packed.qkv if b is not None]), expected_bias)
    if all(on):
        assert theirs.copied_bytes == 0
    assert torch.equal(ours.out[0], out.weight.unflatten(1, (H, -1))[:, index].flatten(1))
    assert max(ours.copied_bytes, theirs.copied_bytes) <= block_bytes(AttentionParts((fused,), out, H), mlp)


@pytest.mark.parametrize("layout", ["fused", "separate"])
@given(
    heads=st.lists(st.booleans(), min_size=H, max_size=H),
    groups=st.lists(st.booleans(), min_size=G, max_size=G),
)
def test_the_size_of_a_packing_is_known_before(layout: str, heads: list[bool], groups: list[bool]) -> None:
    attention, mlp = parts()
    if layout == "separate":
        attention = AttentionParts(tuple(nn.Linear(D, D) for _ in range(3)), attention.out, H)
    head_mask, group_mask = np.array(heads), np.array(groups)
    assert attention_bytes(attention, head_mask) == pack_attention(attention, head_mask).copied_bytes
    assert mlp_bytes(mlp, group_mask) == pack_mlp(mlp, group_mask).copied_bytes
