"""A nested model, trained form against deployed form: its masks are prefixes, so every slice is a view."""

from __future__ import annotations

import pytest
import torch
from core_builders import TIMESTEPS, randomize, relative_error, route_tokens, small_dydit, small_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.config import DyDiTConfig
from dydit.export.schedule import SubnetSchedule
from dydit.runtime.engine import SubnetEngine
from dydit.shapes import CONDITIONINGS

TOLERANCE = 1e-5


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@given(seed=st.integers(0, 1000), always_on=st.booleans(), groups=st.sampled_from([None, 1, 6]))
@settings(max_examples=15)
@torch.no_grad()
def test_sliced_equals_masked(conditioning: str, seed: int, always_on: bool, groups: int | None) -> None:
    config = DyDiTConfig(nested=True, always_on=always_on, mlp_groups=groups, token_router_ratio=4)
    model = small_dydit(seed, config, mixed=False, mlp_ratio=3.0, conditioning=conditioning)
    randomize(model.dynamic_blocks, seed)
    t = torch.tensor(TIMESTEPS)
    x, y = small_inputs(model.shape, batch=len(t), seed=seed)
    route_tokens(model, x, t, y)
    schedule = SubnetSchedule.from_model(model, TIMESTEPS)
    for masks in (schedule.heads, schedule.groups):
        assert (masks[..., 1:] <= masks[..., :-1]).all()
    engine = SubnetEngine(model, schedule)
    masked, routing = model(x, t, y, return_routing=True)
    assert (routing.heads.bool().numpy() == schedule.heads).all()
    assert relative_error(engine(x, t, y), masked) < TOLERANCE
