from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from core_builders import embedded, relative_error, small_dit, small_inputs
from torch import nn

from dydit.models.blocks import (
    Block,
    Conditioning,
    CrossAttention,
    ModulationLinear,
    add_gated,
    modulate,
    modulations,
)
from dydit.shapes import CONDITIONINGS


def test_modulate_and_gate_are_per_sample() -> None:
    torch.manual_seed(0)
    x, branch = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    shift, scale, gate = torch.randn(3, 2, 8)
    expected = x * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(modulate(x, shift, scale), expected)
    torch.testing.assert_close(add_gated(x, branch, gate), x + gate[:, None] * branch)
    assert modulate(x, None, None) is x
    assert torch.equal(add_gated(x, branch, None), x + branch)


def test_cross_attention_is_torchs_own() -> None:
    torch.manual_seed(0)
    ours, theirs = CrossAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, context = torch.randn(2, 6, 32), torch.randn(2, 3, 32)
    assert relative_error(ours(x, context), theirs(x, context, context)[0]) < 1e-5
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = theirs(x, context, context, key_padding_mask=~mask)[0]
    assert relative_error(ours(x, context, mask[:, None, None]), expected) < 1e-5


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_modulation_is_a_linear_layer_for_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    layer = ModulationLinear(24, 144, dtype=dtype)
    x = torch.randn(rows, 24, dtype=dtype, requires_grad=True)
    found, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)
    inputs = (x, layer.weight, layer.bias)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("batch", [1, 2, 8, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulations_of_all_blocks_are_those_of_each(
    conditioning: str, batch: int, dtype: torch.dtype
) -> None:
    model = small_dit(conditioning=conditioning).to(dtype)
    x, y = small_inputs(model.shape, batch=batch)
    _, cond = embedded(model, x.to(dtype), 500.0, y.to(dtype) if y.is_floating_point() else y)
    found = modulations([*model.blocks], cond)
    assert len(found) == len(model.blocks)
    for block, of_block in zip(model.blocks, found, strict=True):
        expected = block.modulation(cond)
        assert [row is None for row in of_block] == [row is None for row in expected]
        for name, row in expected._asdict().items():
            if row is not None:
                added = 1 if name.startswith("scale") else 0
                torch.testing.assert_close(getattr(of_block, name), row.unsqueeze(1) + added)


@torch.no_grad()
def test_adaln_zero_block_follows_its_equation() -> None:
    torch.manual_seed(0)
    block = Block(32, 4, 64, "adaln_zero")
    nn.init.normal_(block.adaLN_modulation[1].weight)
    x, c = torch.randn(2, 6, 32), torch.randn(2, 32)
    a = block.adaLN_modulation[1](F.silu(c))[:, None]
    shift1, scale1, gate1, shift2, scale2, gate2 = a.split(32, dim=2)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    q, k, v = block.attn.qkv(norm(x) * (1 + scale1) + shift1).view(2, 6, 3, 4, 8).permute(2, 0, 3, 1, 4)
    attended = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 32)
    y = x + gate1 * block.attn.proj(attended)
    hidden = F.gelu(block.mlp.fc1(norm(y) * (1 + scale2) + shift2), approximate="tanh")
    expected = y + gate2 * block.mlp.fc2(hidden)
    assert relative_error(block(x, Conditioning(timestep=c, vector=c)), expected) < 1e-5


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_modulation_by_design(conditioning: str) -> None:
    model = small_dit(conditioning=conditioning)
    x, y = small_inputs(model.shape)
    tokens, cond = embedded(model, x, 5, y)
    given = [part is not None for part in model.blocks[0].modulation(cond)]
    expected = {"adaln": [True, True, False] * 2, "adaln_zero": [True] * 6, "adaln_single": [True] * 6}
    assert given == expected.get(conditioning, [False] * 6)
    assert tokens.shape == (3, model.shape.tokens, 32)
    crossed = model.blocks[0].cross(tokens, cond)
    assert (crossed is tokens) == (conditioning not in ("cross_attention", "adaln_single"))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_width_routers_input_is_the_timestep_alone(conditioning: str) -> None:
    model = small_dit(conditioning=conditioning)
    x, y = small_inputs(model.shape)
    _, one = embedded(model, x, 5, y)
    _, other = embedded(model, x.flip(0), 5, y.flip(0))
    assert torch.equal(one.timestep, other.timestep)
    assert torch.equal(one.timestep[0], one.timestep[1])
