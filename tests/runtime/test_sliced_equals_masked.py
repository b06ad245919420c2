"""The first promise: the sliced network computes what the masked one computes, for any masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from core_builders import (
    TIMESTEPS,
    random_masks,
    relative_error,
    route_tokens,
    route_widths,
    routing_of,
    small_dit,
    small_inputs,
)
from hypothesis import given
from hypothesis import strategies as st

from dydit.config import DyDiTConfig
from dydit.dynamic.convert import convert
from dydit.dynamic.dydit import DyDiT
from dydit.export.schedule import SubnetSchedule
from dydit.runtime.engine import SubnetEngine
from dydit.shapes import CONDITIONINGS, ModelShape

TOLERANCE = 1e-5
WIDTHS = ("all", "none", "one", "random")


@dataclass(frozen=True)
class Case:
    """A model's dimensions, its masks and a batch."""

    seed: int = 0
    sample_size: int | tuple[int, int] = 8
    num_heads: int = 4
    mlp_groups: int | None = None
    learn_sigma: bool = True
    always_on: bool = False
    routed: tuple[bool, bool, bool] = (True, True, True)
    head_width: str = "random"
    group_width: str = "random"
    tokens: tuple[str, str] = ("some", "some")
    capacities: tuple[int, int] = (5, 11)
    token_threshold: float = 0.5
    steps: tuple[int, ...] = (0, 1, 2)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    share = st.sampled_from(["none", "some", "all"])
    return Case(
        seed=draw(st.integers(0, 1000)),
        sample_size=draw(st.sampled_from([8, (4, 12), (8, 4)])),
        num_heads=draw(st.sampled_from([1, 2, 4])),
        mlp_groups=draw(st.sampled_from([None, 1, 3, 6])),
        learn_sigma=draw(st.booleans()),
        always_on=draw(st.booleans()),
        routed=draw(st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any)),
        head_width=draw(st.sampled_from(WIDTHS)),
        group_width=draw(st.sampled_from(WIDTHS)),
        tokens=draw(st.tuples(share, share)),
        capacities=draw(st.tuples(*[st.integers(0, 100) | st.sampled_from([0, 10_000])] * 2)),
        token_threshold=draw(st.sampled_from([0.5, 0.2, 0.9])),
        steps=draw(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)),
    )


def masks_of(case: Case, shape: ModelShape) -> tuple[np.ndarray, np.ndarray]:
    heads, groups = random_masks(case.seed, len(TIMESTEPS), shape, always_on=False)
    one = np.random.default_rng(case.seed)
    for masks, width, routed in zip(
        (heads, groups), (case.head_width, case.group_width), case.routed, strict=False
    ):
        if width != "random":
            masks[:] = width == "all"
        if width == "one":
            masks[..., one.integers(masks.shape[-1])] = True
        if case.always_on:
            masks[..., 0] = True
        if not routed:
            masks[:] = True
    return heads, groups


def build(case: Case, conditioning: str) -> tuple[DyDiT, np.ndarray, np.ndarray]:
    head_routing, mlp_routing, token_routing = case.routed
    config = DyDiTConfig(
        mlp_groups=case.mlp_groups,
        head_routing=head_routing,
        mlp_routing=mlp_routing,
        token_routing=token_routing,
        always_on=case.always_on,
        token_threshold=case.token_threshold,
        token_router_ratio=4,
    )
    backbone = small_dit(
        case.seed,
        sample_size=case.sample_size,
        num_heads=case.num_heads,
        mlp_ratio=3.0,
        learn_sigma=case.learn_sigma,
        conditioning=conditioning,
    )
    model = convert(backbone, config, copy=False)
    heads, groups = masks_of(case, model.shape)
    route_widths(model, TIMESTEPS, heads, groups)
    return model, heads, groups


@torch.no_grad()
def check(case: Case, conditioning: str) -> None:
    model, heads, groups = build(case, conditioning)
    steps = list(case.steps)
    t = torch.tensor(TIMESTEPS)[steps]
    x, y = small_inputs(model.shape, batch=len(steps), seed=case.seed)
    route_tokens(model, x, t, y, case.tokens)
    schedule = SubnetSchedule.from_model(model, TIMESTEPS)
    assert (schedule.heads == heads).all() and (schedule.groups == groups).all()
    engine = SubnetEngine(model, schedule)

    masked, routing = model(x, t, y, return_routing=True)
    assert (routing.heads.bool().numpy() == heads[steps]).all()
    assert (routing.groups.bool().numpy() == groups[steps]).all()
    for gates, share in zip(routing.tokens.unbind(1), case.tokens, strict=True):
        if share != "some" or not case.routed[2]:
            assert gates.eq(float(share != "none" or not case.routed[2])).all()
        else:
            assert 0 < gates.sum() < gates.numel()

    assert relative_error(engine(x, t, y), masked) < TOLERANCE
    forced = model(x, t, y, routing=routing_of(heads[steps], groups[steps], routing.tokens))
    assert relative_error(forced, masked) < TOLERANCE
    if len(set(steps)) == 1:
        assert relative_error(engine(x, float(t[0]), y), masked) < TOLERANCE


@torch.no_grad()
def check_capacities(case: Case, conditioning: str) -> None:
    """A fixed number of tokens per timestep and block, the same in both forms."""
    model, _, _ = build(case, conditioning)
    N = model.shape.tokens
    x, y = small_inputs(model.shape, batch=len(case.steps), seed=case.seed)
    t = torch.tensor(TIMESTEPS)[list(case.steps)]
    route_tokens(model, x, t, y)  # random scores lie apart by far more than rounding
    first, second = (min(k, N) if case.routed[2] else N for k in case.capacities)
    capacities = np.array([[first, second], [second, first], [N, N]], np.int32)
    schedule = SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities)
    engine = SubnetEngine(model, schedule, mode="capacity")
    output = engine(x, t, y)
    for i, step in enumerate(case.steps):
        one = slice(i, i + 1)
        masked, routing = model(
            x[one], t[one], y[one], capacities=capacities[step].tolist(), return_routing=True
        )
        assert routing.tokens.sum(-1).tolist() == [capacities[step].tolist()]
        assert relative_error(output[one], masked) < TOLERANCE


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@given(case=cases())
def test_capacities_for_any_masks(conditioning: str, case: Case) -> None:
    check_capacities(case, conditioning)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@given(case=cases())
def test_for_any_masks(conditioning: str, case: Case) -> None:
    check(case, conditioning)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(head_width="all", group_width="all", tokens=("all", "all")), id="all on"),
        pytest.param(Case(head_width="one", group_width="all"), id="one head"),
        pytest.param(Case(head_width="all", group_width="one"), id="one group"),
        pytest.param(Case(head_width="none"), id="no head"),
        pytest.param(Case(group_width="none"), id="no group"),
        pytest.param(Case(head_width="none", group_width="none"), id="no head, no group"),
        pytest.param(Case(tokens=("none", "none")), id="no token"),
        pytest.param(Case(tokens=("all", "all")), id="every token"),
        pytest.param(Case(always_on=True, head_width="none", group_width="none"), id="only always-on"),
        pytest.param(Case(always_on=True, num_heads=1), id="one head in all, without a score"),
        pytest.param(Case(steps=(1,)), id="one sample"),
        pytest.param(Case(steps=(2, 0, 2, 1)), id="every sample its own timestep"),
        pytest.param(Case(steps=(1, 1, 1)), id="one timestep for all"),
        pytest.param(Case(sample_size=(8, 16), mlp_groups=6, learn_sigma=False), id="rectangle"),
    ],
)
def test_at_the_edges(conditioning: str, case: Case) -> None:
    check(case, conditioning)
