from __future__ import annotations

import pytest
import torch
from core_builders import small_dit, small_inputs

from dydit.adapters.dit import DiTAdapter
from dydit.shapes import CONDITIONINGS


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_facts_are_the_models_own_parts(conditioning: str) -> None:
    model, adapter = small_dit(conditioning=conditioning), DiTAdapter()
    x, y = small_inputs(model.shape)
    cond = adapter.condition(model, torch.full((3,), 500.0), y)
    tokens = adapter.embed(model, x, cond)
    assert adapter.shape(model) is model.shape
    assert torch.equal(adapter.timestep_embedding(model, torch.tensor([500.0] * 3)), cond.timestep)
    for block in adapter.blocks(model):
        attention, mlp = adapter.attention(block), adapter.mlp(block)
        assert attention.qkv == (block.attn.qkv,) and attention.out is block.attn.proj
        assert attention.num_heads == 4
        assert mlp.fc1 is block.mlp.fc1 and mlp.fc2 is block.mlp.fc2 and mlp.act(torch.zeros(1)) == 0
        assert adapter.norms(block) == (block.norm1, block.norm2)
        tokens = block(tokens, cond)
    assert torch.equal(adapter.decode(model, tokens, cond), model(x, 500, y))
