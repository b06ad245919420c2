from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dydit.diffusion.iddpm import IDDPMObjective
from dydit.errors import ConfigError, ShapeError

SHAPE = (6, 3, 2, 5)  # rectangular, and not the usual four channels
T = torch.tensor([0, 0, 1, 40, 700, 999])


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = (torch.rand(SHAPE, generator=generator) * 255).round() / 127.5 - 1.0
    x0[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])  # the open bins too
    noise = torch.randn(SHAPE, generator=generator)
    output = torch.randn(6, 6, 2, 5, generator=generator)
    return x0, noise, output


def vb_in_numpy(output: np.ndarray, x0: np.ndarray, x_t: np.ndarray, t: int, num_timesteps: int) -> float:
    """One sample's bound from the definitions, by way of the predicted x_0; in bits per dimension."""
    scale = 1000 / num_timesteps
    beta = np.linspace(scale * 1e-4, scale * 0.02, num_timesteps)
    level = np.cumprod(1 - beta)
    before = level[t - 1] if t > 0 else 1.0
    later = max(t, 1)
    beta_tilde = beta[later] * (1 - level[later - 1]) / (1 - level[later])
    epsilon, v = output[: len(x0)], output[len(x0) :]

    def posterior_mean(start: np.ndarray) -> np.ndarray:
        return (np.sqrt(before) * beta[t] * start + np.sqrt(1 - beta[t]) * (1 - before) * x_t) / (
            1 - level[t]
        )

    mean = posterior_mean((x_t - np.sqrt(1 - level[t]) * epsilon) / np.sqrt(level[t]))
    sigma = np.exp(0.5 * ((v + 1) / 2 * np.log(beta[t]) + (1 - v) / 2 * np.log(beta_tilde)))
    if t > 0:
        shift = posterior_mean(x0) - mean
        nats = np.log(sigma / np.sqrt(beta_tilde)) + (beta_tilde + shift**2) / (2 * sigma**2) - 0.5
    else:
        cdf = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))
        above = np.where(x0 > 0.999, 1.0, cdf((x0 + 1 / 255 - mean) / sigma))
        below = np.where(x0 < -0.999, 0.0, cdf((x0 - 1 / 255 - mean) / sigma))
        nats = -np.log(above - below)
    return float(nats.mean() / np.log(2))


@pytest.mark.parametrize("num_timesteps", [1000, 4000])
def test_the_bound_agrees_with_its_definition(num_timesteps: int) -> None:
    x0, noise, output = batch()
    # Near the truth at t = 0, as float64 differences of Φ say nothing in the far tails.
    output[:2, :3] = noise[:2] + 0.5 * output[:2, :3]
    objective = IDDPMObjective(num_timesteps=num_timesteps)
    x_t = objective.corrupt(x0, noise, T)
    loss = objective.loss(output, x0, x_t, noise, T)
    assert loss.vb is not None
    expected = [
        vb_in_numpy(out.numpy(), start.numpy(), noisy.numpy(), t, num_timesteps)
        for out, start, noisy, t in zip(output.double(), x0.double(), x_t.double(), T.tolist(), strict=True)
    ]
    np.testing.assert_allclose(loss.vb.numpy(), expected, rtol=2e-4)
    mse = (noise - output[:, :3]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.mse, mse)
    torch.testing.assert_close(loss.total, mse + loss.vb * num_timesteps / 1000)


def test_the_bound_is_zero_at_the_true_posterior() -> None:
    x0, noise, _ = batch()
    objective = IDDPMObjective()
    perfect = torch.cat([noise, -torch.ones(SHAPE)], dim=1)  # v = -1: the posterior's own variance
    loss = objective.loss(perfect, x0, objective.corrupt(x0, noise, T), noise, T)
    assert loss.vb is not None
    torch.testing.assert_close(loss.vb[2:], torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(loss.mse, torch.zeros(6))


def test_the_bound_teaches_the_variance_and_the_mse_the_mean() -> None:
    x0, noise, output = batch()
    objective = IDDPMObjective()
    x_t = objective.corrupt(x0, noise, T)
    output.requires_grad_()
    loss = objective.loss(output, x0, x_t, noise, T)
    assert loss.vb is not None
    (of_vb,) = torch.autograd.grad(loss.vb.sum(), output, retain_graph=True)
    (of_mse,) = torch.autograd.grad(loss.mse.sum(), output)
    assert (of_vb[:, :3] == 0).all() and (of_vb[:, 3:] != 0).any(dim=(1, 2, 3)).all()
    assert (of_mse[:, 3:] == 0).all() and (of_mse[:, :3] != 0).all()
    assert torch.isfinite(of_vb).all()


def test_without_learned_variance_only_the_mse_is_left() -> None:
    x0, noise, output = batch()
    objective = IDDPMObjective(learn_sigma=False)
    loss = objective.loss(output[:, :3], x0, objective.corrupt(x0, noise, T), noise, T)
    assert loss.vb is None and loss.total is loss.mse


def test_half_precision_outputs_are_judged_in_float32() -> None:
    x0, noise, output = batch()
    objective = IDDPMObjective()
    x_t = objective.corrupt(x0, noise, T)
    half = objective.loss(output.bfloat16(), x0, x_t, noise, T)
    full = objective.loss(output.bfloat16().float(), x0, x_t, noise, T)
    assert half.total.dtype == torch.float32
    torch.testing.assert_close(half.total, full.total, rtol=0, atol=0)
    assert objective.corrupt(x0.bfloat16(), noise.bfloat16(), T).dtype == torch.bfloat16


def test_the_loss_reads_nothing_back_from_the_device() -> None:
    x = torch.empty(SHAPE, device="meta")
    t = T.to("meta")
    objective = IDDPMObjective()
    loss = objective.loss(torch.empty(6, 6, 2, 5, device="meta"), x, objective.corrupt(x, x, t), x, t)
    assert loss.total.shape == (6,)


@pytest.mark.parametrize(("learn_sigma", "channels"), [(True, 3), (True, 8), (False, 6)])
def test_other_output_channels_are_refused(learn_sigma: bool, channels: int) -> None:
    x0, noise, _ = batch()
    expected = 6 if learn_sigma else 3
    with pytest.raises(ShapeError, match=f"expected {expected} channels with learn_sigma={learn_sigma}"):
        IDDPMObjective(learn_sigma=learn_sigma).loss(torch.zeros(6, channels, 2, 5), x0, x0, noise, T)


@pytest.mark.parametrize("stratified", [True, False])
def test_timesteps_are_integers_of_the_schedule(stratified: bool) -> None:
    t = IDDPMObjective(stratified=stratified).sample_t(4000, torch.Generator().manual_seed(0), "cpu")
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    counts = torch.bincount(t // 250, minlength=4)
    assert (counts == 1000).all() == stratified


def test_a_schedule_that_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="expected at least 21"):
        IDDPMObjective(num_timesteps=10)
