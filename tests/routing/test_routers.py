from __future__ import annotations

import pytest
import torch
from core_builders import randomize, small_dit

from dydit.config import DyDiTConfig
from dydit.costs import RouterShape
from dydit.routing.routers import BlockRouters, TokenRouter, WidthRouter, router_shape, token_hidden

SHAPE = small_dit().shape.with_groups(8)


def test_always_on_components_have_no_score() -> None:
    router = WidthRouter(32, 4, always_on=True, open_bias=15.0)
    randomize(router)
    timestep = torch.randn(3, 32)
    logits = router(timestep)
    assert router.router.weight.shape == (3, 32) and logits.shape == (3, 4)
    assert logits[:, 0].isposinf().all()
    assert torch.equal(logits[:, 1:], router.router(timestep))
    free = WidthRouter(32, 4, always_on=False, open_bias=15.0)
    assert free.router.weight.shape == (4, 32) and free(timestep).isfinite().all()


def test_routers_start_open() -> None:
    timestep, tokens = torch.randn(3, 32), torch.randn(3, 5, 32)
    assert (WidthRouter(32, 4, False, 15.0)(timestep) == 15.0).all()
    assert (TokenRouter(32, 16, 35.0)(tokens) == 35.0).all()


def test_token_router_reads_each_token_alone() -> None:
    router = TokenRouter(32, 4, 0.0)
    randomize(router)
    tokens = torch.randn(3, 5, 32)
    assert router(tokens).shape == (3, 5)
    torch.testing.assert_close(router(tokens)[1, 2], router(tokens[1, 2]))
    assert [tuple(p.shape) for p in router.parameters()] == [(8, 32), (8,), (1, 8), (1,)]


def test_token_hidden_is_never_nothing() -> None:
    assert (token_hidden(1152, 16), token_hidden(32, 16), token_hidden(8, 16)) == (72, 2, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("off", ["head_routing", "mlp_routing", "token_routing"])
def test_a_router_that_is_switched_off_is_absent_and_open(off: str, training: bool) -> None:
    routers = BlockRouters(SHAPE, DyDiTConfig(mlp_groups=8, **{off: False}))  # type: ignore[arg-type]
    for router in (routers.head_router, routers.group_router, routers.token_router):
        if router is not None:
            torch.nn.init.constant_(list(router.parameters())[-1], -50.0)  # shut
    routers.train(training)
    timestep, tokens = torch.randn(3, 32), torch.randn(3, 5, 32)
    opened = {
        "head_routing": routers.head_gates(timestep),
        "mlp_routing": routers.group_gates(timestep),
        "token_routing": routers.token_gates(tokens),
    }
    assert [tuple(gates.shape) for gates in opened.values()] == [(3, 4), (3, 8), (3, 5)]
    for name, gates in opened.items():
        assert gates[:, 1:].eq(float(name == off)).all()
    assert len(list(routers.children())) == 2


def test_thresholds_are_those_of_the_config() -> None:
    routers = BlockRouters(SHAPE, DyDiTConfig(mlp_groups=8, threshold=0.9, token_threshold=0.1)).eval()
    for router in (routers.head_router, routers.token_router):
        assert router is not None
        torch.nn.init.constant_(list(router.parameters())[-1], 0.0)  # every score is 0.5
    assert routers.head_gates(torch.randn(2, 32))[:, 1:].eq(0).all()
    assert routers.token_gates(torch.randn(2, 5, 32)).eq(1).all()


def test_evaluation_draws_no_random_number() -> None:
    routers = BlockRouters(SHAPE, DyDiTConfig(mlp_groups=8, open_bias=0, token_open_bias=0))
    timestep, tokens = torch.randn(2, 32), torch.randn(2, 5, 32)
    state = torch.get_rng_state()
    routers.eval()
    routers.head_gates(timestep), routers.group_gates(timestep), routers.token_gates(tokens)
    assert torch.equal(torch.get_rng_state(), state)
    routers.train()
    routers.head_gates(timestep)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("always_on", [True, False])
@pytest.mark.parametrize("off", [None, "head_routing", "mlp_routing", "token_routing"])
def test_router_shape_tells_the_layers_that_there_are(off: str | None, always_on: bool) -> None:
    config = DyDiTConfig(mlp_groups=8, always_on=always_on, **({} if off is None else {off: False}))  # type: ignore[arg-type]
    routers = BlockRouters(SHAPE, config)
    heads, groups, tokens = routers.head_router, routers.group_router, routers.token_router
    assert router_shape(SHAPE, config) == RouterShape(
        head_scores=0 if heads is None else heads.router.out_features,
        group_scores=0 if groups is None else groups.router.out_features,
        token_hidden=0 if tokens is None else tokens[0].out_features,
    )
