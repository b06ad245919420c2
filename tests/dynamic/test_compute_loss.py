from __future__ import annotations

import numpy as np
import pytest
import torch
from core_builders import gates_of, random_masks, routing_of, small_dit
from hypothesis import given
from hypothesis import strategies as st

from dydit.config import DyDiTConfig
from dydit.costs import outer_macs, static_macs
from dydit.dynamic.compute_loss import (
    compute_loss,
    compute_ratio,
    deployed_cost,
    minimum_ratio,
    ramped_target,
)
from dydit.routing.routing import Routing
from dydit.shapes import CONDITIONINGS, ModelShape

SHAPES = {c: small_dit(conditioning=c).shape.with_groups(8) for c in CONDITIONINGS}
configs = st.builds(
    DyDiTConfig,
    head_routing=st.booleans(),
    mlp_routing=st.booleans(),
    token_routing=st.booleans(),
    always_on=st.booleans(),
    mlp_groups=st.just(8),
)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_everything_on_is_the_static_model_and_the_token_routers(conditioning: str) -> None:
    shape = SHAPES[conditioning]
    ratio = compute_ratio(shape, DyDiTConfig(), Routing.complete(shape, 2, torch.zeros(1)))
    routers = shape.depth * shape.tokens * (2 * 32 + 2)  # two hidden units of 32 inputs, one output of two
    expected = (static_macs(shape) + routers) / static_macs(shape)
    assert ratio.tolist() == pytest.approx([expected] * 2, rel=1e-6)


def test_without_token_routers_everything_on_is_one() -> None:
    shape, config = SHAPES["adaln_zero"], DyDiTConfig(token_routing=False)
    assert compute_ratio(shape, config, Routing.complete(shape, 1, torch.zeros(1))).item() == pytest.approx(1)


def random_routing(seed: int, shape: ModelShape, config: DyDiTConfig, density: float) -> Routing:
    heads, groups = random_masks(seed, 3, shape, config.always_on)
    rng = np.random.default_rng(seed)
    tokens = rng.random((3, shape.depth, shape.tokens)) < density
    for masks, routed in (
        (heads, config.head_routing), (groups, config.mlp_routing), (tokens, config.token_routing)
    ):  # fmt: skip
        masks[:] |= not routed
    return routing_of(heads, groups, torch.from_numpy(tokens))


@given(configs, st.sampled_from(CONDITIONINGS), st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]))
def test_the_minimum_is_never_undercut(
    config: DyDiTConfig, conditioning: str, seed: int, density: float
) -> None:
    shape = SHAPES[conditioning]
    ratio = compute_ratio(shape, config, random_routing(seed, shape, config, density))
    assert ratio.shape == (3,)
    assert ratio.min().item() >= minimum_ratio(shape, config) - 1e-6


@given(configs, st.sampled_from(CONDITIONINGS))
def test_the_minimum_is_reached(config: DyDiTConfig, conditioning: str) -> None:
    shape = SHAPES[conditioning]
    routing = Routing.complete(shape, 1, torch.zeros(1))
    first = int(config.always_on)
    if config.head_routing:
        routing.heads[..., first:] = 0
    if config.mlp_routing:
        routing.groups[..., first:] = 0
    if config.token_routing:
        routing.tokens[:] = 0
    ratio = compute_ratio(shape, config, routing).item()
    assert ratio == pytest.approx(minimum_ratio(shape, config), rel=1e-6)
    assert 0 < minimum_ratio(shape, config) <= 1 + 1e-9 or not any(
        (config.head_routing, config.mlp_routing, config.token_routing)
    )


def test_the_ratio_is_the_closed_form_of_each_sample() -> None:
    shape, config = SHAPES["adaln_zero"], DyDiTConfig(mlp_groups=8)
    routing = random_routing(3, shape, config, 0.5)
    cost = deployed_cost(shape, config)
    for sample, ratio in enumerate(compute_ratio(shape, config, routing).tolist()):
        counts = [[int(g[sample, block].sum()) for g in gates_of(routing)] for block in range(2)]
        macs = outer_macs(shape) + sum(cost.executed(h, g, k) for h, g, k in counts)
        assert ratio == pytest.approx(macs / static_macs(shape), rel=1e-6)


def test_its_gradient_is_what_one_more_gate_would_cost() -> None:
    shape, config = SHAPES["adaln_zero"], DyDiTConfig(mlp_groups=8)
    routing = random_routing(3, shape, config, 0.5)
    gates = [g.requires_grad_() for g in gates_of(routing)]
    heads, groups, tokens = torch.autograd.grad(compute_ratio(shape, config, routing).sum(), gates)
    cost, static = deployed_cost(shape, config), static_macs(shape)
    torch.testing.assert_close(heads, torch.full_like(heads, cost.per_head / static))
    one_group = cost.per_token_group * routing.tokens.sum(-1, keepdim=True) / static
    torch.testing.assert_close(groups, one_group.expand_as(groups))
    one_token = (cost.per_token + cost.per_token_group * routing.groups.sum(-1, keepdim=True)) / static
    torch.testing.assert_close(tokens, one_token.expand_as(tokens))


def test_half_precision_gates_lose_nothing() -> None:
    """At 600 tokens bfloat16 would count in steps of four."""
    shape = small_dit(sample_size=(48, 50), conditioning="adaln_zero").shape
    routing = Routing.complete(shape, 1, torch.zeros(1, dtype=torch.bfloat16))
    routing.tokens[..., :3] = 0
    exact = Routing(routing.heads.double(), routing.groups.double(), routing.tokens.double())
    ratio = compute_ratio(shape, DyDiTConfig(), routing)
    assert ratio.dtype == torch.float32
    assert ratio.item() == pytest.approx(compute_ratio(shape, DyDiTConfig(), exact).item(), rel=1e-6)


def test_the_mean_comes_before_the_square() -> None:
    assert compute_loss(torch.tensor([0.2, 0.8]), 0.5).item() == pytest.approx(0, abs=1e-12)
    assert compute_loss(torch.tensor([0.9, 0.7]), 0.5).item() == pytest.approx(0.09)


@given(st.floats(0.01, 1.0), st.integers(1, 5000), st.integers(0, 10_000))
def test_the_target_falls_linearly_from_one(target: float, ramp_steps: int, step: int) -> None:
    value = ramped_target(step, target, ramp_steps)
    assert ramped_target(0, target, ramp_steps) == 1.0
    assert target <= value + 1e-12 and value <= 1.0
    if step >= ramp_steps:
        assert value == target  # to the last bit: a log shows the target that was asked for
    else:
        assert value == pytest.approx(1 - step / ramp_steps * (1 - target))


def test_without_a_ramp_the_target_holds_at_once() -> None:
    assert ramped_target(0, 0.3, 0) == 0.3
