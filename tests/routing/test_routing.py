from __future__ import annotations

import dataclasses

import pytest
import torch
from core_builders import small_dit

from dydit.errors import ShapeError
from dydit.routing.routing import Routing, RoutingLogits

SHAPE = small_dit(conditioning="in_context").shape.with_groups(8)


def test_complete_has_every_gate_on() -> None:
    routing = Routing.complete(SHAPE, 3, torch.zeros(1, dtype=torch.bfloat16))
    routing.check(SHAPE, 3)
    assert routing.heads.shape == (3, 2, 4) and routing.groups.shape == (3, 2, 8)
    assert routing.tokens.shape == (3, 2, 18)  # 16 patches, timestep and label
    assert all(
        g.dtype == torch.bfloat16 and g.eq(1).all() for g in (routing.heads, routing.groups, routing.tokens)
    )


@pytest.mark.parametrize("name", ["heads", "groups", "tokens"])
def test_gates_of_another_shape_are_named(name: str) -> None:
    routing = Routing.complete(SHAPE, 3, torch.zeros(1))
    wrong = dataclasses.replace(routing, **{name: getattr(routing, name)[..., 1:]})
    with pytest.raises(ShapeError, match=rf"routing\.{name} of shape \(3, 2, \d+\); expected \(3, 2, \d+\)"):
        wrong.check(SHAPE, 3)
    with pytest.raises(ShapeError, match="routing.heads"):
        routing.check(SHAPE, 2)


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ({}, ""),
        ({"groups": 1}, "dynamic_blocks.1.routers.group_router"),
        ({"tokens": 0}, "dynamic_blocks.0.routers.token_router"),
        ({"tokens": 0, "heads": 1}, "dynamic_blocks.1.routers.head_router"),  # widths are decided first
        ({"heads": 1, "groups": 0}, "dynamic_blocks.0.routers.group_router"),
    ],
)
def test_the_first_router_that_gives_nan_is_named(broken: dict[str, int], expected: str) -> None:
    logits = RoutingLogits(torch.full((3, 2, 4), torch.inf), torch.zeros(3, 2, 8), -torch.ones(3, 2, 18))
    for name, block in broken.items():
        getattr(logits, name)[2, block, 1] = torch.nan
    assert logits.first_nan() == expected
