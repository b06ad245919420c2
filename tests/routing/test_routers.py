from __future__ import annotations

import pytest
import torch
from core_builders import randomize, small_dit, small_dydit

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


@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_under_autocast_the_width_is_decided_as_without(nested: bool) -> None:
    """Deployment reads the width off routers in float32: training in bf16 has to mean the same."""
    model = small_dydit(config=DyDiTConfig(nested=nested), mixed=False)
    for routers in model.routers:
        for router in (routers.head_router, routers.group_router):
            randomize(router, 1)
            router.router.bias.fill_(15.0)  # where bf16 knows steps of 1/16
    t = torch.arange(0.0, 1000.0, 50.0)
    wanted = model.width_logits(model.adapter.timestep_embedding(model.backbone, t))
    with torch.autocast("cpu", torch.bfloat16):
        found = model.width_logits(model.adapter.timestep_embedding(model.backbone, t))
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.bfloat16  # autocast is on
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@torch.no_grad()
def test_under_autocast_token_scores_keep_full_precision() -> None:
    routers = BlockRouters(SHAPE, DyDiTConfig(token_router_ratio=4))
    randomize(routers, 0)
    routers.token_router[2].bias.fill_(35.0)
    tokens = torch.randn(4, 64, SHAPE.hidden_size)
    exact = routers.token_logits(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = routers.token_logits(tokens)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 0.05 < (exact.bfloat16() - exact).abs().max()
    assert len(found.unique()) > 200 > len(exact.bfloat16().unique())


def test_routers_compile_into_one_graph_under_autocast() -> None:
    routers = BlockRouters(SHAPE, DyDiTConfig(token_router_ratio=4))
    randomize(routers, 0)
    timestep, tokens = torch.randn(4, SHAPE.hidden_size), torch.randn(4, 16, SHAPE.hidden_size)

    def logits(timestep: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return routers.head_logits(timestep), routers.token_logits(tokens)

    compiled = torch.compile(logits, backend="eager", fullgraph=True)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for a, b in zip(compiled(timestep, tokens), logits(timestep, tokens), strict=True):
                torch.testing.assert_close(a, b)
