from __future__ import annotations

import pytest
import torch
from core_builders import small_dydit, small_inputs

from dydit.errors import CheckpointError
from dydit.evaluation.calls import Call, route_calls


@pytest.mark.parametrize("kind", ["head_router", "group_router", "token_router"])
def test_a_router_that_gives_nan_is_named_with_the_timestep(kind: str) -> None:
    model = small_dydit(mixed=False)
    x, y = small_inputs(model.shape, batch=2)
    calls = [Call(x, t, y) for t in (999.0, 500.0)]
    assert len(route_calls(model, calls)) == 2
    with torch.no_grad():
        list(getattr(model.routers[1], kind).parameters())[-1].fill_(torch.nan)
    with pytest.raises(
        CheckpointError, match=rf"blocks\.1\.routers\.{kind} are NaN at timestep 999; expected"
    ):
        route_calls(model, calls)
