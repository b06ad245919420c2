from __future__ import annotations

import numpy as np
import pytest
from diffusers import DDPMScheduler

from dydit.diffusion.betas import (
    clipped_log_posterior_variances,
    linear_betas,
    posterior_variances,
    signal_levels,
)
from dydit.errors import ConfigError


def test_the_published_schedule() -> None:
    betas = linear_betas(1000)
    assert (betas[0], betas[-1], len(betas)) == (1e-4, 0.02, 1000)
    np.testing.assert_allclose(np.diff(betas), (0.02 - 1e-4) / 999)


def test_the_schedule_is_diffusers_own() -> None:
    scheduler = DDPMScheduler()
    np.testing.assert_allclose(scheduler.betas.numpy(), linear_betas(1000), rtol=1e-6)
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), signal_levels(linear_betas(1000)), rtol=1e-5)


@pytest.mark.parametrize("num_timesteps", [100, 250, 4000])
def test_any_length_ends_in_noise(num_timesteps: int) -> None:
    assert signal_levels(linear_betas(num_timesteps))[-1] < 1e-4


def test_the_shortest_schedule() -> None:
    assert linear_betas(21).max() < 1


@pytest.mark.parametrize("num_timesteps", [20, 1, 0, -5])
def test_too_short_a_schedule_is_refused(num_timesteps: int) -> None:
    with pytest.raises(ConfigError, match=f"{num_timesteps} timesteps; expected at least 21.*raise"):
        linear_betas(num_timesteps)


def test_posterior_variance_is_the_product_of_two_gaussians() -> None:
    """q(x_{t-1} | x_t, x_0) by Bayes: the precisions of the two Gaussians over x_{t-1} add up."""
    betas = linear_betas(1000)
    previous = signal_levels(betas)[:-1]
    by_bayes = 1.0 / ((1.0 - betas[1:]) / betas[1:] + 1.0 / (1.0 - previous))
    np.testing.assert_allclose(posterior_variances(betas)[1:], by_bayes, rtol=1e-9)
    assert posterior_variances(betas)[0] == 0


def test_the_first_log_variance_is_the_second() -> None:
    betas = linear_betas(1000)
    clipped = clipped_log_posterior_variances(betas)
    assert clipped[0] == clipped[1]
    np.testing.assert_allclose(np.exp(clipped[1:]), posterior_variances(betas)[1:])
