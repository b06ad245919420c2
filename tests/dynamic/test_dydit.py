from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from core_builders import TIMESTEPS, gates_of, relative_error, small_dit, small_dydit, small_inputs
from torch import Tensor

from dydit.config import DyDiTConfig
from dydit.dynamic.compute_loss import compute_loss, compute_ratio
from dydit.dynamic.convert import convert
from dydit.dynamic.dydit import DyDiT
from dydit.dynamic.loading import load_dydit
from dydit.errors import ConfigError, ShapeError
from dydit.routing.gates import GateNoise
from dydit.routing.routing import Routing
from dydit.shapes import CONDITIONINGS


def mixed_batch(model: DyDiT) -> tuple[Tensor, Tensor, Tensor]:
    x, y = small_inputs(model.shape)
    return x, torch.tensor(TIMESTEPS), y


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("training", [True, False])
def test_the_returned_routing_is_the_one_that_was_used(conditioning: str, training: bool) -> None:
    model = small_dydit(conditioning=conditioning).train(training)
    x, t, y = mixed_batch(model)
    prediction, routing = model(x, t, y, return_routing=True)
    routing.check(model.shape, 3)
    for gates in gates_of(routing):
        assert set(gates.unique().tolist()) <= {0.0, 1.0} and 0 < gates.mean() < 1
    assert torch.equal(model(x, t, y, routing=routing), prediction)


def test_evaluation_is_deterministic_and_training_is_not() -> None:
    model = small_dydit()
    for routers in model.routers:
        assert routers.token_router is not None
        torch.nn.init.zeros_(routers.token_router[2].weight)
        torch.nn.init.zeros_(routers.token_router[2].bias)  # every token at a probability of one half
    batch = mixed_batch(model)
    assert torch.equal(model(*batch), model(*batch))
    model.train()
    torch.manual_seed(0)
    first, second = model(*batch), model(*batch)
    torch.manual_seed(0)
    assert torch.equal(model(*batch), first) and not torch.equal(first, second)


def test_given_noise_makes_a_training_forward_a_function_of_its_arguments() -> None:
    model = small_dydit().train()
    batch = mixed_batch(model)
    noise = GateNoise.draw(model.shape, 3, torch.Generator().manual_seed(0), torch.device("cpu"))
    state = torch.get_rng_state()
    first, routing = model(*batch, noise=noise, return_routing=True)
    again, same = model(*batch, noise=noise, return_routing=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    for one, other, drawn, logits in zip(
        gates_of(routing), gates_of(same), gates_of(noise), gates_of(routing.logits), strict=True
    ):
        assert torch.equal(one, other)
        assert torch.equal(one, (logits + drawn > 0).float())
    # Silence decides as evaluation does.
    silence = GateNoise(*(torch.zeros_like(n) for n in gates_of(noise)))
    assert relative_error(model(*batch, noise=silence), model.eval()(*batch)) < 1e-6


def test_noises_temperature_changes_gradients_and_not_decisions() -> None:
    model = small_dydit().train()
    batch = mixed_batch(model)
    drawn = GateNoise.draw(model.shape, 3, torch.Generator().manual_seed(0), torch.device("cpu"))
    found = []
    for temperature in (None, model.routing_config.temperature, torch.tensor(1.0)):
        output = model(*batch, noise=dataclasses.replace(drawn, temperature=temperature))
        gradients = torch.autograd.grad(output.square().mean(), list(model.router_parameters()))
        found.append((output, torch.cat([g.flatten() for g in gradients])))
    assert all(torch.equal(output, found[0][0]) for output, _ in found)
    assert torch.equal(found[0][1], found[1][1]) and not torch.allclose(found[0][1], found[2][1])


def test_logits_are_what_the_gates_were_decided_on() -> None:
    model = small_dydit()
    _, routing = model(*mixed_batch(model), return_routing=True)
    for gates, logits in zip(gates_of(routing), gates_of(routing.logits), strict=True):
        assert torch.equal(gates, (logits > 0).float())
    assert routing.logits.heads[..., 0].isposinf().all()
    for other in ({"complete": True}, {"routing": routing}):
        _, without = model(*mixed_batch(model), return_routing=True, **other)
        assert without.logits is None


def test_complete_runs_no_router() -> None:
    model = small_dydit().train()
    for routers in model.routers:
        for parameter in routers.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
    batch = mixed_batch(model)
    state = torch.get_rng_state()
    prediction, routing = model(*batch, complete=True, return_routing=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert relative_error(prediction, model.backbone(*batch)) < 1e-6
    assert all(gates.eq(1).all() for gates in gates_of(routing))


def test_width_depends_on_the_timestep_alone() -> None:
    model = small_dydit()
    x, y = small_inputs(model.shape)
    _, one = model(x, 500.0, y, return_routing=True)
    _, other = model(x.flip(0) * 2, 500.0, y.flip(0), return_routing=True)
    assert torch.equal(one.heads, other.heads) and torch.equal(one.groups, other.groups)
    assert not torch.equal(one.tokens, other.tokens)
    assert (one.heads == one.heads[:1]).all()
    _, later = model(x, 20.0, y, return_routing=True)
    assert not torch.equal(one.heads, later.heads)


def test_the_first_head_and_group_are_always_on() -> None:
    model = small_dydit()
    for routers in model.routers:
        for router in (routers.head_router, routers.group_router):
            assert router is not None
            torch.nn.init.zeros_(router.router.weight)
            torch.nn.init.constant_(router.router.bias, -50.0)
    for training in (True, False):
        _, routing = model.train(training)(*mixed_batch(model), return_routing=True)
        for gates in (routing.heads, routing.groups):
            assert gates[..., 0].eq(1).all() and gates[..., 1:].eq(0).all()


def test_routing_of_another_shape_is_refused() -> None:
    model = small_dydit()
    x, t, y = mixed_batch(model)
    routing = Routing.complete(model.shape, 2, x)
    with pytest.raises(ShapeError, match=r"routing.heads of shape \(2, 2, 4\); expected \(3, 2, 4\)"):
        model(x, t, y, routing=routing)


def test_gradients_reach_every_router_and_the_backbone() -> None:
    model = small_dydit().train()
    with torch.no_grad():
        for parameter in model.router_parameters():
            parameter.mul_(0.1)  # out of the sigmoid's flat ends
    torch.manual_seed(0)
    model(*mixed_batch(model)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("complete", [True, False])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(conditioning: str, complete: bool) -> None:
    model = small_dydit(conditioning=conditioning).train()

    def run(model: DyDiT) -> tuple[Tensor, Routing, dict[str, Any]]:
        torch.manual_seed(7)  # the same noise
        prediction, routing = model(*mixed_batch(model), complete=complete, return_routing=True)
        ratio = compute_ratio(model.shape, model.routing_config, routing)
        loss = prediction.square().mean() + compute_loss(ratio, 0.5)
        loss.backward()
        return loss.detach(), routing, {name: p.grad for name, p in model.named_parameters()}

    checkpointed = copy.deepcopy(model)
    checkpointed.enable_gradient_checkpointing()
    loss, routing, gradients = run(model)
    loss_again, routing_again, gradients_again = run(checkpointed)
    assert torch.equal(loss, loss_again)
    assert torch.equal(routing.tokens, routing_again.tokens)
    for name, gradient in gradients.items():
        again = gradients_again[name]
        assert (gradient is None) == (again is None) == (complete and "router" in name), name
        assert gradient is None or torch.equal(gradient, again), name


def test_runs_under_autocast_in_training() -> None:
    model = small_dydit().train()
    with torch.autocast("cpu", torch.bfloat16):
        prediction, routing = model(*mixed_batch(model), return_routing=True)
        ratio = compute_ratio(model.shape, model.routing_config, routing)
    (prediction.float().square().mean() + ratio.mean()).backward()
    assert ratio.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compiles_without_a_graph_break() -> None:
    model = small_dydit().train()
    batch = mixed_batch(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    expected = model(*batch)
    torch.manual_seed(0)
    assert relative_error(compiled(*batch), expected) < 1e-6


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_from_pretrained_round_trip_is_bit_equal(conditioning: str, tmp_path: Any) -> None:
    config = DyDiTConfig(mlp_groups=8, token_router_ratio=4, threshold=0.4, always_on=False)
    model = small_dydit(config=config, conditioning=conditioning, sample_size=(8, 4))
    model.save_pretrained(tmp_path)
    loaded = DyDiT.from_pretrained(tmp_path)
    assert (loaded.shape, loaded.routing_config) == (model.shape, config)
    batch = mixed_batch(model)
    assert torch.equal(loaded(*batch), model(*batch))


def test_one_head_and_one_group_in_all_save_and_load(tmp_path: Any) -> None:
    """Always on: nothing is left to decide, and the routers hold no score."""
    model = convert(small_dit(num_heads=1))
    model.save_pretrained(tmp_path)
    loaded = DyDiT.from_pretrained(tmp_path)
    assert loaded.routers[0].head_router is not None
    assert loaded.routers[0].head_router.router.weight.shape == (0, 32)
    assert torch.equal(loaded(*mixed_batch(model)), model(*mixed_batch(model)))


def test_null_label_and_scopes() -> None:
    model = small_dydit()
    assert model.null_label == 10
    modules = dict(model.named_modules())
    assert len(model.mac_scopes()) == 2 and all(scope in modules for scope in model.mac_scopes().values())


def test_thresholds_change_evaluation_and_what_is_saved(tmp_path: Path) -> None:
    model = small_dydit(config=DyDiTConfig(token_router_ratio=4, mlp_groups=8))
    batch = mixed_batch(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(*batch, return_routing=True)[1].logits
    model.set_thresholds(0.3, 0.8)
    changed, routing = model(*batch, return_routing=True)
    for gates, found, threshold in zip(gates_of(routing), gates_of(logits), (0.3, 0.3, 0.8), strict=True):
        # The last block's tokens depend on what the first one does.
        assert torch.equal(gates[:, 0], (found[:, 0].sigmoid() > threshold).float())
    assert model.routing_config.mlp_groups == 8
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = load_dydit(tmp_path)
    assert (loaded.routing_config.threshold, loaded.routing_config.token_threshold) == (0.3, 0.8)
    assert torch.equal(loaded(*batch), changed)


def test_thresholds_there_and_back_change_nothing() -> None:
    model = small_dydit()
    before, config = model(*mixed_batch(model)), model.config.dydit
    model.set_thresholds(0.999, 0.001)
    assert not torch.equal(model(*mixed_batch(model)), before)
    model.set_thresholds(0.5, 0.5)
    assert torch.equal(model(*mixed_batch(model)), before) and model.config.dydit == config


@pytest.mark.parametrize("thresholds", [(0.0, 0.5), (0.5, 1.0), (1.5, 0.5), (0.5, float("nan"))])
def test_thresholds_out_of_range_are_refused_and_nothing_changes(thresholds: tuple[float, float]) -> None:
    model = small_dydit()
    with pytest.raises(ConfigError, match="threshold"):
        model.set_thresholds(*thresholds)
    assert (model.routing_config.threshold, model.routing_config.token_threshold) == (0.5, 0.5)
    assert all(routers.config == model.routing_config for routers in model.routers)


def test_capacities_take_that_many_tokens_of_every_sample() -> None:
    model = small_dydit()
    N = model.shape.tokens
    for capacities in ([0, N], [N, 0], [5, 11]):
        _, routing = model(*mixed_batch(model), capacities=capacities, return_routing=True)
        assert routing.tokens.sum(-1).tolist() == [capacities] * 3
        scores = routing.logits.tokens
        kept = routing.tokens > 0
        lowest_kept = scores.masked_fill(~kept, torch.inf).amin(-1)
        assert (lowest_kept >= scores.masked_fill(kept, -torch.inf).amax(-1)).all()


def test_capacity_of_all_tokens_is_the_threshold_that_keeps_all() -> None:
    model = small_dydit()
    every = model(*mixed_batch(model), capacities=[model.shape.tokens] * 2)
    _, routing = model(*mixed_batch(model), return_routing=True)
    opened = dataclasses.replace(routing, tokens=torch.ones_like(routing.tokens))
    assert relative_error(every, model(*mixed_batch(model), routing=opened)) < 1e-6


@pytest.mark.parametrize("capacities", [[1], [1, 2, 3], [-1, 3], [17, 3]])
def test_capacities_that_do_not_fit(capacities: list[int]) -> None:
    model = small_dydit()
    with pytest.raises(ShapeError, match=r"capacities \[.*expected 2 numbers of tokens, 0 to 16 each"):
        model(*mixed_batch(model), capacities=capacities)


def test_capacities_are_for_evaluation_and_for_routers_that_decide() -> None:
    model = small_dydit()
    batch = mixed_batch(model)
    _, routing = model(*batch, return_routing=True)
    with pytest.raises(ConfigError, match="capacities together with other gates"):
        model(*batch, capacities=[3, 3], routing=routing)
    with pytest.raises(ConfigError, match="capacities together with other gates"):
        model(*batch, capacities=[3, 3], complete=True)
    with pytest.raises(ConfigError, match=r"capacities in training mode.*call eval\(\)"):
        model.train()(*batch, capacities=[3, 3])
    without = small_dydit(config=DyDiTConfig(token_routing=False))
    with pytest.raises(ShapeError, match="expected 2 numbers of tokens, 16 to 16 each"):
        without(*batch, capacities=[16, 15])
