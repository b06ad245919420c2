from __future__ import annotations

import pytest
import torch

from dydit.diffusion.flow import FlowObjective
from dydit.errors import ConfigError, ShapeError

SHAPE = (3, 2, 4, 6)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def test_the_path_leads_from_data_to_noise() -> None:
    x0, noise = batch()
    t = torch.tensor([0.0, 1000.0, 250.0])
    x_t = FlowObjective().corrupt(x0, noise, t)
    torch.testing.assert_close(x_t[0], x0[0])
    torch.testing.assert_close(x_t[1], noise[1])
    torch.testing.assert_close(x_t[2], 0.75 * x0[2] + 0.25 * noise[2])


def test_the_target_is_the_path_s_velocity() -> None:
    x0, noise = (x.double() for x in batch())
    objective = FlowObjective()
    t = torch.tensor([10.0, 500.0, 990.0], dtype=torch.float64)
    velocity = (objective.corrupt(x0, noise, t + 1.0) - objective.corrupt(x0, noise, t - 1.0)) * 500.0
    loss = objective.loss(velocity, x0, objective.corrupt(x0, noise, t), noise, t)
    torch.testing.assert_close(loss.total, torch.zeros(3, dtype=torch.float64))
    assert loss.vb is None and loss.total is loss.mse


def test_the_loss_is_the_mean_square_per_sample() -> None:
    x0, noise = batch()
    off = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1)
    loss = FlowObjective().loss(noise - x0 + off, x0, x0, noise, torch.zeros(3))
    torch.testing.assert_close(loss.mse, torch.tensor([1.0, 4.0, 9.0]))


def test_variance_channels_take_no_part() -> None:
    x0, noise = batch()
    output = torch.randn(3, 4, 4, 6, requires_grad=True)
    FlowObjective(learn_sigma=True).loss(output, x0, x0, noise, torch.zeros(3)).total.sum().backward()
    assert output.grad is not None
    assert (output.grad[:, 2:] == 0).all() and (output.grad[:, :2] != 0).all()
    with pytest.raises(ShapeError, match="expected 2 channels"):
        FlowObjective(learn_sigma=False).loss(output, x0, x0, noise, torch.zeros(3))


@pytest.mark.parametrize("stratified", [True, False])
def test_times_are_uniform_on_the_model_s_scale(stratified: bool) -> None:
    objective = FlowObjective(num_timesteps=500, stratified=stratified)
    t = objective.sample_t(4000, torch.Generator().manual_seed(1))
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() < 500
    assert t.mean().item() == pytest.approx(250, abs=12)
    assert (torch.bincount((t // 125).long(), minlength=4) == 1000).all() == stratified


def test_half_precision_outputs_are_judged_in_float32() -> None:
    x0, noise = batch()
    loss = FlowObjective().loss((noise - x0).bfloat16(), x0, x0, noise, torch.zeros(3))
    assert loss.total.dtype == torch.float32 and loss.total.max() < 1e-3


def test_no_timesteps_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 timesteps; expected at least 1; set"):
        FlowObjective(num_timesteps=0)
