from __future__ import annotations

import pytest
import torch
from core_builders import small_dydit, small_inputs

from dydit.errors import CheckpointError
from dydit.evaluation.calls import Call, largest_difference, route_calls


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


@pytest.mark.parametrize("broken", [0, 1])
def test_an_output_that_is_not_finite_is_no_agreement(broken: int) -> None:
    networks = [small_dydit(mixed=False), small_dydit(mixed=False)]
    x, y = small_inputs(networks[0].shape, batch=2)
    calls = [Call(x, t, y) for t in (999.0, 500.0)]
    assert largest_difference(*networks, calls) == 0
    with torch.no_grad():
        list(networks[broken].backbone.parameters())[-1].fill_(torch.nan)
    with pytest.raises(CheckpointError, match="an output at timestep 999 is not finite"):
        largest_difference(*networks, calls)
