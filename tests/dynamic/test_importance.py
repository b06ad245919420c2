from __future__ import annotations

import pytest
import torch
from core_builders import relative_error, small_dit, small_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dydit.adapters.base import AttentionParts
from dydit.adapters.dit import DiTAdapter
from dydit.dynamic.importance import (
    channel_magnitudes,
    head_magnitudes,
    permute_by_importance,
    permute_channels,
    permute_heads,
)
from dydit.shapes import CONDITIONINGS

ADAPTER = DiTAdapter()


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_the_function_stays_and_the_largest_come_first(conditioning: str) -> None:
    model = small_dit(conditioning=conditioning)
    x, y = small_inputs(model.shape)
    before = model(x, 500.0, y)
    old = [sorted(head_magnitudes(ADAPTER.attention(b)).tolist(), reverse=True) for b in model.blocks]
    permute_by_importance(ADAPTER, model)
    assert relative_error(model(x, 500.0, y), before) < 1e-5
    for block, magnitudes in zip(model.blocks, old, strict=True):
        heads, channels = head_magnitudes(ADAPTER.attention(block)), channel_magnitudes(ADAPTER.mlp(block))
        assert heads.diff().max() <= 0 and channels.diff().max() <= 0
        assert heads.tolist() == pytest.approx(magnitudes)


@torch.no_grad()
def test_a_second_call_changes_nothing() -> None:
    model = small_dit()
    permute_by_importance(ADAPTER, model)
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    permute_by_importance(ADAPTER, model)
    assert all(torch.equal(tensor, once[name]) for name, tensor in model.state_dict().items())


@given(st.permutations(range(4)), st.permutations(range(128)))
@torch.no_grad()
def test_any_permutation_keeps_the_function(heads: list[int], channels: list[int]) -> None:
    model = small_dit(depth=1)
    x, y = small_inputs(model.shape)
    before = model(x, 500.0, y)
    attention, mlp = ADAPTER.attention(model.blocks[0]), ADAPTER.mlp(model.blocks[0])
    first, row = head_magnitudes(attention)[heads[0]], mlp.fc1.weight[channels[0]].clone()
    permute_heads(attention, torch.tensor(heads))
    permute_channels(mlp, torch.tensor(channels))
    assert relative_error(model(x, 500.0, y), before) < 1e-5
    assert head_magnitudes(attention)[0] == first and torch.equal(mlp.fc1.weight[0], row)


def test_magnitudes_are_l1_norms_of_a_components_own_weights() -> None:
    model = small_dit(depth=1)
    block = model.blocks[0]
    qkv, out = block.attn.qkv.weight.view(3, 4, 8, 32), block.attn.proj.weight.view(32, 4, 8)
    expected = qkv.abs().sum((0, 2, 3)) + out.abs().sum((0, 2))
    torch.testing.assert_close(head_magnitudes(ADAPTER.attention(block)).float(), expected)
    expected = block.mlp.fc1.weight.abs().sum(1) + block.mlp.fc2.weight.abs().sum(0)
    torch.testing.assert_close(channel_magnitudes(ADAPTER.mlp(block)).float(), expected)


def test_separate_layers_have_the_fused_ones_magnitudes() -> None:
    fused, out = nn.Linear(32, 96), nn.Linear(32, 32)
    separate = [nn.Linear(32, 32) for _ in range(3)]
    for layer, rows in zip(separate, fused.weight.detach().split(32), strict=True):
        layer.weight.data.copy_(rows)
    one = head_magnitudes(AttentionParts((fused,), out, 4))
    torch.testing.assert_close(head_magnitudes(AttentionParts(tuple(separate), out, 4)), one)
