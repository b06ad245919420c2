"""``forward_with_cfg`` of every model: one call on the doubled batch, equal to the formula in two calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_builders import TIMESTEPS, relative_error, small_dit, small_dydit, small_inputs
from torch import Tensor, nn

from dydit.errors import ConfigError, DataError
from dydit.export.schedule import SubnetSchedule
from dydit.runtime.engine import SubnetEngine

T = torch.tensor(TIMESTEPS)
KINDS = ("DiT", "DyDiT", "SubnetEngine")


def make(kind: str, **overrides: Any) -> Any:
    if kind == "DiT":
        return small_dit(in_channels=4, **overrides)
    model = small_dydit(in_channels=4, **overrides)
    return model if kind == "DyDiT" else SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS))


def batches(model: nn.Module) -> list[int]:
    """Grows by the batch size of every call of the model."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize(("guided_channels", "guided"), [(3, 3), (None, 4), (1, 1), (9, 4)])
@torch.no_grad()
def test_equals_the_formula_in_two_calls(
    kind: str, learn_sigma: bool, guided_channels: int | None, guided: int
) -> None:
    model = make(kind, learn_sigma=learn_sigma)
    x, y = small_inputs(model.shape)
    y = y - 1  # real classes
    conditional, null = model(x, T, y), model(x, T, torch.full_like(y, model.null_label))
    expected = conditional.clone()
    expected[:, :guided] = null[:, :guided] + 4.0 * (conditional - null)[:, :guided]
    seen = batches(model)
    output = model.forward_with_cfg(x, T, y, 4.0, guided_channels)
    assert relative_error(output, expected) < 1e-5
    assert seen == [6]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scale_one_costs_no_second_half(kind: str) -> None:
    model = make(kind)
    x, y = small_inputs(model.shape)
    expected, seen = model(x, T, y), batches(model)
    assert torch.equal(model.forward_with_cfg(x, T, y, 1.0), expected)
    assert seen == [3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [20.0, torch.tensor(20.0)])
@torch.no_grad()
def test_one_timestep_for_the_whole_batch(kind: str, t: Tensor | float) -> None:
    model = make(kind)
    x, y = small_inputs(model.shape)
    one_each = model.forward_with_cfg(x, torch.full((3,), 20.0), y, guidance_scale=1.5)
    assert torch.equal(model.forward_with_cfg(x, t, y, guidance_scale=1.5), one_each)


@torch.no_grad()
def test_text_is_guided_against_the_text_that_is_given_for_none() -> None:
    model = small_dit(conditioning="adaln_single")
    x, y = small_inputs(model.shape)
    none = torch.zeros_like(y)
    conditional, null = model(x, 500.0, y)[:, :3], model(x, 500.0, none)[:, :3]
    output = model.forward_with_cfg(x, 500.0, y, 2.0, None, null_y=none)
    assert relative_error(output[:, :3], null + 2.0 * (conditional - null)) < 1e-5
    assert torch.equal(model.forward_with_cfg(x, 500.0, y, 2.0, None), output)  # its own is zeros
    model.y_embedder.null_text.fill_(1.0)
    assert not torch.equal(model.forward_with_cfg(x, 500.0, y, 2.0, None), output)
    assert torch.equal(model.forward_with_cfg(x, 500.0, y, 1), model(x, 500.0, y))


@torch.no_grad()
def test_a_model_without_a_null_class_cannot_be_guided_and_needs_no_row_for_it() -> None:
    model = small_dit(null_class=False)
    x, y = small_inputs(model.shape)
    y = y.clamp(max=model.shape.num_classes - 1)
    assert len(model.y_embedder.embedding_table.weight) == model.shape.num_classes
    assert torch.equal(model.forward_with_cfg(x, 5, y, 1), model(x, 5, y))
    with pytest.raises(ConfigError, match="without a null class"):
        model.forward_with_cfg(x, 5, y, 1.5)
    with pytest.raises(DataError, match="no null class"):
        model(x, 5, torch.full_like(y, model.shape.num_classes))


def test_refuses_channels_below_one() -> None:
    model = small_dit()
    x, y = small_inputs(model.shape)
    with pytest.raises(ConfigError, match="guided_channels is 0; expected at least 1"):
        model.forward_with_cfg(x, 5, y, 2.0, 0)


def test_gradients_reach_the_weights() -> None:
    model = small_dit()
    x, y = small_inputs(model.shape)
    model.forward_with_cfg(x, 5, y, 2.0).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
