from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from dydit.diffusion.gaussian import (
    bits_per_dimension,
    discretised_gaussian_log_likelihood,
    gaussian_kl,
    mean_per_sample,
)

MEANS = st.floats(-5, 5)
LOG_VARIANCES = st.floats(-10, 5)
GREY_LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1.0


def double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@given(MEANS, LOG_VARIANCES, MEANS, LOG_VARIANCES)
def test_kl_is_that_of_torch(mean_q: float, log_var_q: float, mean_p: float, log_var_p: float) -> None:
    ours = gaussian_kl(double(mean_q), double(log_var_q), double(mean_p), double(log_var_p))
    theirs = kl_divergence(
        Normal(double(mean_q), math.exp(log_var_q / 2)), Normal(double(mean_p), math.exp(log_var_p / 2))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert ours >= -1e-12


@given(MEANS, LOG_VARIANCES)
def test_kl_of_a_gaussian_with_itself_is_zero(mean: float, log_variance: float) -> None:
    assert gaussian_kl(double(mean), double(log_variance), double(mean), double(log_variance)) == 0


@given(st.floats(-3, 3), st.floats(-12, 3))
def test_likelihood_sums_to_one_over_the_grey_levels(mean: float, log_variance: float) -> None:
    log_p = discretised_gaussian_log_likelihood(GREY_LEVELS, double(mean), double(log_variance))
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    assert (log_p <= 0).all()


@given(st.floats(-0.9, 0.9), st.floats(-8, 0))
def test_likelihood_of_an_inner_bin_is_the_integral(mean: float, log_variance: float) -> None:
    normal = Normal(double(mean), math.exp(log_variance / 2))
    level = GREY_LEVELS[140]
    expected = normal.cdf(level + 1 / 255) - normal.cdf(level - 1 / 255)
    log_p = discretised_gaussian_log_likelihood(level, double(mean), double(log_variance))
    torch.testing.assert_close(log_p.exp(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("mean", [-50.0, -2.0, 0.1, 2.0, 50.0])
@pytest.mark.parametrize("log_variance", [-10.0, -4.0, 2.0])
def test_float32_stays_accurate_and_differentiable_in_the_tails(mean: float, log_variance: float) -> None:
    spread = torch.full((256,), log_variance, requires_grad=True)
    single = discretised_gaussian_log_likelihood(GREY_LEVELS.float(), torch.tensor(mean), spread)
    reference = discretised_gaussian_log_likelihood(GREY_LEVELS, double(mean), double(log_variance))
    torch.testing.assert_close(single.double(), reference, rtol=2e-3, atol=1e-4)
    single.sum().backward()
    assert spread.grad is not None and torch.isfinite(spread.grad).all()


def test_a_value_beyond_the_grey_levels_takes_the_outer_bin() -> None:
    log_p = discretised_gaussian_log_likelihood(double(3.0), double(3.0), double(0.0))
    assert log_p.exp().item() == pytest.approx(1 - Normal(0.0, 1.0).cdf(torch.tensor(-1 / 255)).item())


def test_nats_become_bits_per_dimension() -> None:
    nats = torch.full((3, 2, 4, 5), math.log(2.0))
    torch.testing.assert_close(bits_per_dimension(nats), torch.ones(3))


def test_mean_per_sample_keeps_samples_apart() -> None:
    values = torch.arange(24.0).reshape(2, 3, 2, 2)
    torch.testing.assert_close(mean_per_sample(values), torch.tensor([5.5, 17.5]))
