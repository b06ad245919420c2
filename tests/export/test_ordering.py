"""Ordering by use changes the weights and the share of views, never the function."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from core_builders import (
    TIMESTEPS,
    random_masks,
    randomize,
    relative_error,
    route_tokens,
    route_widths,
    small_diffusers_dit,
    small_dit,
    small_dydit,
    small_inputs,
)
from hypothesis import given
from hypothesis import strategies as st

from dydit.config import DyDiTConfig
from dydit.dynamic.convert import convert
from dydit.dynamic.dydit import DyDiT
from dydit.export.ordering import order_by_use
from dydit.export.schedule import SubnetSchedule, is_one_run
from dydit.runtime.engine import SubnetEngine
from dydit.shapes import CONDITIONINGS

T = torch.tensor(TIMESTEPS)
SETTINGS: dict[str, dict[str, Any]] = {
    "always on": {"mlp_groups": 16},
    "every component has a score": {"mlp_groups": 8, "always_on": False},
    "no head routers": {"mlp_groups": 16, "head_routing": False},
    "no group routers": {"mlp_routing": False},
}


def diffusers_dydit(config: DyDiTConfig) -> DyDiT:
    return convert(small_diffusers_dit(out_channels=6), config, copy=False)


def routed(model: DyDiT, seed: int = 0) -> DyDiT:
    heads, groups = random_masks(seed, len(TIMESTEPS), model.shape, model.routing_config.always_on)
    route_widths(model, TIMESTEPS, heads, groups)
    x, y = small_inputs(model.shape, batch=len(TIMESTEPS), seed=seed)
    route_tokens(model, x, T, y)
    return model


@torch.no_grad()
def check_function(model: DyDiT) -> None:
    """Masked and sliced outputs before and after."""
    x, y = small_inputs(model.shape, batch=len(TIMESTEPS))
    schedule = SubnetSchedule.from_model(model, TIMESTEPS)
    masked, routing = model(x, T, y, return_routing=True)
    complete = model(x, T, y, complete=True)
    order_by_use(model, schedule)
    after, ordered = model(x, T, y, return_routing=True)
    assert relative_error(after, masked) < 1e-5
    assert relative_error(model(x, T, y, complete=True), complete) < 1e-5
    assert torch.equal(ordered.tokens, routing.tokens)
    again = SubnetSchedule.from_model(model, TIMESTEPS)
    assert relative_error(SubnetEngine(model, again)(x, T, y), masked) < 1e-5
    for old, new in ((schedule.heads, again.heads), (schedule.groups, again.groups)):
        for i in range(old.shape[1]):
            masks = old[:, i]
            ordered = masks[:, np.argsort(-masks.sum(0), kind="stable")]  # the most used first
            stay = is_one_run(ordered).sum() < is_one_run(masks).sum()
            assert (new[:, i] == (masks if stay else ordered)).all()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    order_by_use(model, again)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_the_function_stays(conditioning: str, settings: dict[str, Any]) -> None:
    config = DyDiTConfig(token_router_ratio=4, **settings)
    check_function(routed(convert(small_dit(conditioning=conditioning), config, copy=False)))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_diffusers_own_model(settings: dict[str, Any]) -> None:
    check_function(routed(diffusers_dydit(DyDiTConfig(token_router_ratio=4, **settings))))


def test_masks_that_grow_with_the_noise_become_views() -> None:
    """Each timestep uses what the one before it does, and more: prefixes, once they are in order."""
    model = small_dydit(config=DyDiTConfig(mlp_groups=16, token_router_ratio=4), mixed=False)
    rng = np.random.default_rng(0)
    heads, groups = (np.zeros((3, 2, size), bool) for size in (4, 16))
    for masks, counts in ((heads, (3, 2, 1)), (groups, (11, 7, 2))):
        for block in range(2):
            chosen = [0, *(1 + rng.permutation(masks.shape[-1] - 1))]
            for step, count in enumerate(counts):
                masks[step, block, chosen[:count]] = True
    route_widths(model, TIMESTEPS, heads, groups)
    schedule = SubnetSchedule.from_model(model, TIMESTEPS)
    assert schedule.view_share < 0.5
    order_by_use(model, schedule)
    ordered = SubnetSchedule.from_model(model, TIMESTEPS)
    assert ordered.view_share == 1.0
    engine = SubnetEngine(model, ordered)
    x, y = small_inputs(model.shape)
    for t in TIMESTEPS:
        engine(x, t, y)
    assert engine.pack_statistics().bytes == 0 and engine.pack_statistics().views == 6
    assert (ordered.heads[..., 0] & ordered.groups[..., 0]).all()


def test_nested_masks_are_in_order_already() -> None:
    model = convert(small_dit(), DyDiTConfig(nested=True, mlp_groups=8, token_router_ratio=4), copy=False)
    for i, routers in enumerate(model.routers):
        randomize(routers, seed=i, std=1.0)
    schedule = SubnetSchedule.from_model(model, TIMESTEPS)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert schedule.view_share == 1.0
    order_by_use(model, schedule)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@given(seed=st.integers(0, 10_000), always_on=st.booleans())
def test_for_any_masks(seed: int, always_on: bool) -> None:
    config = DyDiTConfig(mlp_groups=8, token_router_ratio=4, always_on=always_on)
    check_function(routed(convert(small_dit(seed), config, copy=False), seed))


def test_an_order_that_would_take_views_away_is_left_alone() -> None:
    """A prefix at two timesteps, which three other masks would tear apart for the sake of one of them."""
    model = small_dydit(config=DyDiTConfig(mlp_groups=8, token_router_ratio=4, always_on=False), mixed=False)
    steps = [float(t) for t in range(900, 0, -200)]
    on = [(0, 1, 2), (0, 1, 2), (3, 5, 7), (1, 5, 7), (4, 5, 7)]
    masks = np.stack([np.isin(np.arange(8), components) for components in on])
    route_widths(model, steps, np.ones((5, 2, 4), bool), np.stack([masks, ~masks], axis=1))
    before, weights = SubnetSchedule.from_model(model, steps), copy.deepcopy(model.state_dict())
    assert before.view_share == 2 / 5
    order_by_use(model, before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
