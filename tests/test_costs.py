from __future__ import annotations

import pytest
import torch

from dydit.costs import BlockCost, RouterShape, block_cost, outer_macs, static_macs
from dydit.models.presets import PRESETS, preset_arguments
from dydit.shapes import CONDITIONINGS, ModelShape


def preset_shape(name: str, conditioning: str = "adaln_zero") -> ModelShape:
    arguments = preset_arguments(name)
    hidden_size, num_heads = arguments["hidden_size"], arguments["num_heads"]
    return ModelShape(
        sample_size=(32, 32), in_channels=4, out_channels=8, mlp_hidden=4 * hidden_size, mlp_groups=num_heads,
        num_classes=1000, conditioning=conditioning, context_dim=64, context_length=7, **arguments,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "gmacs"), [("DiT-S/2", 6.07), ("DiT-B/2", 23.02), ("DiT-XL/2", 118.69)])
def test_published_totals(name: str, gmacs: float) -> None:
    """Zhao et al., DyDiT, results table: the static rows."""
    assert static_macs(preset_shape(name)) / 1e9 == pytest.approx(gmacs, abs=0.01)


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("DiT-S/2", 6.06), ("DiT-S/4", 1.41), ("DiT-S/8", 0.36),
        ("DiT-B/2", 23.01), ("DiT-B/4", 5.56), ("DiT-B/8", 1.42),
        ("DiT-XL/2", 118.64), ("DiT-XL/4", 29.05), ("DiT-XL/8", 7.39),
    ],
)  # fmt: skip
def test_the_dit_papers_totals_leave_only_small_terms_out(name: str, gmacs: float) -> None:
    """Peebles & Xie, table of all models."""
    assert static_macs(preset_shape(name)) / 1e9 == pytest.approx(gmacs, rel=2e-3, abs=6e-3)


def test_cross_attention_costs_about_fifteen_percent_more() -> None:
    """Peebles & Xie, section 3.2."""
    extra = static_macs(preset_shape("DiT-XL/2", "cross_attention")) / static_macs(preset_shape("DiT-XL/2"))
    assert 1.12 < extra < 1.18


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("name", PRESETS)
def test_static_is_every_head_group_and_token(name: str, conditioning: str) -> None:
    shape = preset_shape(name, conditioning)
    full = block_cost(shape).executed(shape.num_heads, shape.mlp_groups, shape.tokens)
    assert static_macs(shape) == outer_macs(shape) + shape.depth * full
    # How the MLP is cut into groups does not change what the whole of it costs.
    assert static_macs(shape.with_groups(2 * shape.mlp_groups)) == static_macs(shape)


def test_routers_cost_their_layers() -> None:
    shape = preset_shape("DiT-S/2")
    D, N = shape.hidden_size, shape.tokens
    extra = block_cost(shape, RouterShape(head_scores=5, group_scores=7, token_hidden=24)).fixed
    assert extra - block_cost(shape).fixed == 12 * D + N * (D * 24 + 24)


def test_the_polynomial_takes_integers_and_tensors() -> None:
    cost = BlockCost(fixed=1000, per_head=100, per_token=10, per_token_group=1)
    assert cost.executed(2, 3, 4) == 1000 + 200 + 40 + 12
    heads, groups, tokens = torch.tensor([[2, 0]]), torch.tensor([[3, 0]]), torch.tensor([[4, 0]])
    assert cost.executed(heads, groups, tokens).tolist() == [[1252, 1000]]
    assert cost.executed(2, 3, 0) == 1200  # no token kept: nothing of the MLP runs
