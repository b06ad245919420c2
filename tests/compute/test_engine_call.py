"""The second promise in capacity mode: counted and analytic MACs agree in every block and part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from core_builders import TIMESTEPS, randomize, small_dydit, small_inputs
from diffusers import DiTTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.compute.engine import count_engine
from dydit.config import DyDiTConfig
from dydit.costs import ROUTERS
from dydit.dynamic.convert import convert
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ScheduleError
from dydit.export.schedule import SubnetSchedule
from dydit.runtime import layers
from dydit.runtime.engine import Mode, SubnetEngine
from dydit.runtime.sliced import filled_up
from dydit.shapes import CONDITIONINGS


def check_counts(model: DyDiT, capacities: np.ndarray, batch: int = 2) -> None:
    schedule = SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities)
    engine = SubnetEngine(model, schedule, mode="capacity")
    x, y = small_inputs(model.shape, batch)
    x = x.to(next(model.parameters()).dtype)
    for position, t in enumerate(TIMESTEPS):
        call = count_engine(engine, x, t, y)
        assert call.counted.unsupported == {}
        assert call.analytic.differences(call.counted.table) == []
        assert call.kept_tokens.tolist() == [capacities[position].tolist()] * batch
        planned = batch * schedule.macs_per_timestep(capacities)[position]
        if engine.computed_tokens(1) == 1:
            assert call.analytic.total == planned
        else:  # what fills the batch up comes on top
            assert planned <= call.analytic.total < 1.5 * planned


def some_capacities(model: DyDiT, seed: int = 0) -> np.ndarray:
    """(S, L), with none and all among them."""
    N = model.shape.tokens
    drawn = np.random.default_rng(seed).integers(0, N + 1, (len(TIMESTEPS), model.shape.depth))
    drawn[0], drawn[1, 1] = (0, N), 0
    return drawn


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_design(conditioning: str) -> None:
    model = small_dydit(conditioning=conditioning)
    check_counts(model, some_capacities(model))


def test_in_bfloat16_where_attention_is_computed_in_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "HAS_AMX", False)
    monkeypatch.setattr(layers, "HAS_BF16", True)
    model = torch.nn.Module.to(small_dydit(), torch.bfloat16)
    check_counts(model, some_capacities(model))
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS))
    x, y = small_inputs(model.shape)
    assert count_engine(engine, x.bfloat16(), TIMESTEPS[0], y).counted.by_op["bmm"] > 0


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize(("dtype", "fills"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_tokens_that_fill_up_are_counted(dtype: str, fills: bool, mode: Mode) -> None:
    """In half precision on the CPU, an MLP runs on a multiple of 16 tokens or more."""
    model = torch.nn.Module.to(small_dydit(3), getattr(torch, dtype))
    schedule = SubnetSchedule.from_model(model, TIMESTEPS, capacities=some_capacities(model))
    engine = SubnetEngine(model, schedule, mode=mode)
    x, y = small_inputs(model.shape, batch=3, seed=3)
    vain = 0
    for t in TIMESTEPS:
        call = count_engine(engine, x.to(model.dtype), t, y)
        assert call.counted.unsupported == {}
        assert call.analytic.differences(call.counted.table) == []
        for kept in call.kept_tokens.sum(0).tolist():
            assert engine.computed_tokens(kept) == (filled_up(kept) if fills else kept)
            if 0 < kept < 3 * model.shape.tokens:
                vain += engine.computed_tokens(kept) - kept
    assert (vain > 0) == fills  # some calls keep a number that is no multiple


def test_diffusers_own_model() -> None:
    backbone = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2,
        sample_size=8, num_embeds_ada_norm=10,
    )  # fmt: skip
    randomize(backbone)
    model = convert(backbone.eval(), DyDiTConfig(token_router_ratio=4), copy=False)
    check_counts(model, some_capacities(model))


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 3), changes=st.fixed_dictionaries({
    "mlp_groups": st.sampled_from([None, 1, 8]), "always_on": st.booleans(), "mlp_routing": st.booleans(),
}))  # fmt: skip
def test_any_capacities(seed: int, batch: int, changes: dict[str, Any]) -> None:
    model = small_dydit(seed, config=DyDiTConfig(token_router_ratio=4, **changes))
    check_counts(model, some_capacities(model, seed), batch)


def test_the_token_router_runs_whatever_the_capacity() -> None:
    """Its cost is a constant of the closed form, at no token and at all of them too."""
    model = small_dydit()
    N = model.shape.tokens
    routers = []
    for capacity in (0, 1, N):
        capacities = np.full((len(TIMESTEPS), model.shape.depth), capacity)
        schedule = SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities)
        engine = SubnetEngine(model, schedule, mode="capacity")
        x, y = small_inputs(model.shape, 1)
        routers.append(count_engine(engine, x, TIMESTEPS[0], y).counted.by_part[ROUTERS])
    assert routers[0] > 0 and len(set(routers)) == 1


def test_without_token_routers_capacity_is_exact() -> None:
    model = small_dydit(config=DyDiTConfig(token_routing=False))
    every = np.full((len(TIMESTEPS), model.shape.depth), model.shape.tokens)
    check_counts(model, every)
    schedule = SubnetSchedule.from_model(model, TIMESTEPS, capacities=every)
    x, y = small_inputs(model.shape)
    engines = [SubnetEngine(model, schedule, mode=mode) for mode in ("exact", "capacity")]
    assert torch.equal(*(engine(x, 20.0, y) for engine in engines))


def test_a_schedule_without_capacities_has_no_capacity_mode() -> None:
    model = small_dydit()
    with pytest.raises(ScheduleError, match="a schedule without capacities.*export again with"):
        SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS), mode="capacity")
