"""Nested width: whatever the logits, what is on is a prefix."""

from __future__ import annotations

import pytest
import torch
from core_builders import gates_of, randomize, small_dydit, small_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dydit.config import DyDiTConfig
from dydit.dynamic.dydit import DyDiT
from dydit.routing.gates import GateNoise, nested_logits
from dydit.routing.routers import BlockRouters

DRAWS = 20_000


def is_prefix(gates: Tensor) -> bool:
    """Whether no gate is open after a closed one."""
    return bool((gates.diff(dim=-1) <= 0).all())


def nested_routers(seed: int = 0, **settings: object) -> BlockRouters:
    config = DyDiTConfig(nested=True, mlp_groups=8, **settings)  # type: ignore[arg-type]
    routers = BlockRouters(small_dydit(mixed=False).shape.with_groups(8), config)
    randomize(routers, seed, std=1.0)
    return routers


@given(rows=st.lists(st.lists(st.floats(-20, 20), min_size=6, max_size=6), min_size=1, max_size=4))
def test_nested_logits_are_the_least_so_far(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows)
    expected = [[min(row[: i + 1]) for i in range(6)] for row in logits.tolist()]
    assert nested_logits(logits).tolist() == expected


@pytest.mark.parametrize("always_on", [True, False])
@given(seed=st.integers(0, 10_000), training=st.booleans(), threshold=st.sampled_from([0.2, 0.5, 0.9]))
def test_heads_and_groups_are_prefixes(seed: int, training: bool, threshold: float, always_on: bool) -> None:
    routers = nested_routers(seed, always_on=always_on, threshold=threshold).train(training)
    torch.manual_seed(seed)
    timestep = torch.randn(16, 32)
    for gates in (routers.head_gates(timestep), routers.group_gates(timestep)):
        assert is_prefix(gates) and set(gates.unique().tolist()) <= {0.0, 1.0}
        assert not always_on or gates[:, 0].eq(1).all()


def test_tokens_have_no_order() -> None:
    routers, logits = nested_routers().eval(), torch.tensor([[-9.0, 9.0, -9.0, 9.0]])
    assert routers.gate(logits, 0.5).tolist() == [[0.0, 1.0, 0.0, 1.0]]
    assert routers.train().gate(logits, 0.5, torch.zeros(1, 4)).tolist() == [[0.0, 1.0, 0.0, 1.0]]


@pytest.mark.parametrize("noise", ["given", "drawn", "none"])
@given(seed=st.integers(0, 10_000))
def test_a_models_own_gates_are_prefixes_too(noise: str, seed: int) -> None:
    model = nested_model(seed).train(noise != "none")
    timestep = 4 * torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    drawn = GateNoise.draw(model.shape, 6, generator, torch.device("cpu")) if noise == "given" else None
    heads, groups = model.width_gates(timestep, drawn)
    assert is_prefix(heads) and is_prefix(groups)
    for i, routers in enumerate(model.routers):  # the block's own helpers decide the same
        if noise == "none":
            assert torch.equal(heads[:, i], routers.head_gates(timestep))
            assert torch.equal(groups[:, i], routers.group_gates(timestep))


def nested_model(seed: int = 0) -> DyDiT:
    model = small_dydit(seed, DyDiTConfig(nested=True, mlp_groups=8, token_router_ratio=4), mixed=False)
    randomize(model.dynamic_blocks, seed)
    return model


def test_a_gate_is_open_with_the_probability_of_its_score() -> None:
    """One draw for all components: independent ones would multiply, and close the last ones."""
    routers = nested_routers(open_bias=0.0).train()
    logits = torch.tensor([torch.inf, 2.0, 0.5, 0.5, -1.0]).expand(DRAWS, 5)
    torch.manual_seed(0)
    found = routers.width_gate(logits).mean(0)
    torch.testing.assert_close(found, logits[0].sigmoid(), atol=0.015, rtol=0)
    assert torch.equal(found[2], found[3])


def test_the_gradient_goes_to_what_held_a_component_down() -> None:
    raw = torch.tensor([[3.0, -1.0, 2.0, -2.0]], requires_grad=True)
    routers = nested_routers().train()
    gates = routers.width_gate(nested_logits(raw), torch.tensor([[0.3, 9.0, 9.0, 9.0]]))
    assert gates.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    (gradient,) = torch.autograd.grad((gates * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum(), raw)
    soft = torch.sigmoid((torch.tensor([3.0, -1.0, -1.0, -2.0]) + 0.3) / routers.config.temperature)
    each = soft * (1 - soft) / routers.config.temperature * torch.tensor([1.0, 10.0, 100.0, 1000.0])
    expected = torch.stack([each[0], each[1] + each[2], torch.zeros(()), each[3]])
    torch.testing.assert_close(gradient[0], expected)


def test_every_router_of_an_open_model_gets_a_gradient() -> None:
    """At the start all logits are equal: none may be left out for coming later."""
    config = DyDiTConfig(nested=True, token_router_ratio=4, open_bias=2.0, token_open_bias=1.0)
    model = small_dydit(0, config, mixed=False).train()
    torch.manual_seed(0)
    x, y = small_inputs(model.shape, batch=4)
    prediction, routing = model(x, torch.tensor([999.0, 600.0, 300.0, 10.0]), y, return_routing=True)
    (prediction.square().mean() + sum(gates.mean() for gates in gates_of(routing))).backward()
    for routers in model.routers:
        for router in (routers.head_router, routers.group_router):
            assert router is not None and router.router.bias.grad is not None
            assert router.router.bias.grad.abs().min() > 0


def test_the_names_and_shapes_of_the_weights_stay() -> None:
    nested = small_dydit(0, DyDiTConfig(nested=True), mixed=False).state_dict()
    plain = small_dydit(0, DyDiTConfig(), mixed=False).state_dict()
    assert {name: tensor.shape for name, tensor in nested.items()} == {
        name: tensor.shape for name, tensor in plain.items()
    }


def test_nan_logits_stay_nan_and_are_no_decision() -> None:
    logits = nested_logits(torch.tensor([[1.0, torch.nan, 2.0]]))
    assert logits.isnan().tolist() == [[False, True, True]]
    gates = nested_routers().train().width_gate(logits, torch.zeros(1, 3))
    assert gates.isnan().tolist() == [[False, True, True]]
