from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from dydit.diffusion import process
from dydit.diffusion.betas import linear_betas
from dydit.diffusion.process import diffusion_tables

SHAPE = (5, 4, 2, 6)
TABLES = diffusion_tables(1000, torch.device("cpu"))
T = torch.tensor([0, 1, 37, 500, 999])


def draws(seed: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def test_noising_agrees_with_diffusers() -> None:
    x0, noise = draws(0, 2)
    expected = DDPMScheduler().add_noise(x0, noise, T)
    torch.testing.assert_close(process.add_noise(TABLES, x0, noise, T), expected, rtol=1e-4, atol=1e-5)


def test_the_true_noise_gives_the_posterior_mean() -> None:
    x0, noise = draws(1, 2)
    x_t = process.add_noise(TABLES, x0, noise, T)
    torch.testing.assert_close(
        process.predicted_mean(TABLES, x_t, noise, T),
        process.posterior_mean(TABLES, x0, x_t, T),
        rtol=1e-4,
        atol=1e-5,
    )


def test_posterior_mean_follows_from_bayes() -> None:
    """Mean of the product of N(x_{t-1}; √ᾱ_{t-1} x_0, 1-ᾱ_{t-1}) and N(x_t; √α x_{t-1}, β), in float64."""
    x0, x_t = (x[2:3].double().numpy() for x in draws(2, 2))
    t, alpha = 37, 1.0 - linear_betas(1000)
    previous = alpha[:t].prod()
    precision = alpha[t] / (1 - alpha[t]) + 1 / (1 - previous)
    weighted = np.sqrt(alpha[t]) / (1 - alpha[t]) * x_t + np.sqrt(previous) / (1 - previous) * x0
    ours = process.posterior_mean(TABLES, torch.from_numpy(x0), torch.from_numpy(x_t), torch.tensor([t]))
    np.testing.assert_allclose(ours.numpy(), weighted / precision, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [1, 2, 250, 999])
def test_the_variance_between_its_ends_is_that_of_diffusers(t: int) -> None:
    (v,) = draws(3, 1)
    scheduler = DDPMScheduler(variance_type="learned_range")
    expected = scheduler._get_variance(t, predicted_variance=v)
    ours = process.interpolated_log_variance(TABLES, v, torch.full((5,), t))
    # Small t: diffusers computes 1 - ᾱ in float32 and loses digits.
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=2e-3)


def test_the_variance_at_its_ends() -> None:
    ones = torch.ones(SHAPE)
    upper = process.interpolated_log_variance(TABLES, ones, T)[:, 0, 0, 0]
    lower = process.interpolated_log_variance(TABLES, -ones, T)[:, 0, 0, 0]
    torch.testing.assert_close(upper, TABLES.log_beta[T])
    torch.testing.assert_close(lower, TABLES.log_posterior[T])


def test_tables_made_under_inference_mode_serve_training() -> None:
    diffusion_tables.cache_clear()
    with torch.inference_mode():
        tables = diffusion_tables(1000, torch.device("cpu"))
    x0 = torch.ones(SHAPE, requires_grad=True)
    process.add_noise(tables, x0, torch.zeros(SHAPE), T).sum().backward()
    assert x0.grad is not None
