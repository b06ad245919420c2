"""Gaussians on tensors of any shape: divergence, discretised likelihood, units. All elementwise, in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The likelihood's bins: 256 grey levels spread over [−1, 1] (Ho et al., section 3.3).
HALF_BIN = 1.0 / 255.0
# Grey levels lie 2/255 apart, so this separates the outermost ones from all others.
OUTERMOST = 0.999


def gaussian_kl(mean_q: Tensor, log_var_q: Tensor, mean_p: Tensor, log_var_p: Tensor) -> Tensor:
    """KL(N(mean_q, var_q) ‖ N(mean_p, var_p)) per element, in nats; shapes broadcast."""
    log_ratio = log_var_q - log_var_p
    squared_shift = (mean_q - mean_p).square() * torch.exp(-log_var_p)
    return 0.5 * (torch.exp(log_ratio) - 1.0 - log_ratio + squared_shift)


def discretised_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability that a Gaussian puts on the grey-level bin of x (Ho et al., *DDPM*, eq. 13).

    A bin reaches 1/255 to either side; those of −1 and 1 are open to the outside, so the 256 bins
    cover the real line. The normal distribution function is exact and evaluated in its lower tail,
    so that values far from the mean keep a finite, accurate logarithm and gradient.

    Args:
        x: data, nominally in [−1, 1]; beyond it (latents) the outer bins are meant.
        mean, log_variance: of the Gaussian; broadcast against x.

    Returns:
        nats per element, at most 0.
    """
    precision = torch.exp(-0.5 * log_variance)
    centred = x - mean
    # Mirrored so that the bin lies below the mean: there log Φ has no cancellation.
    below = -centred.abs()
    log_upper = torch.special.log_ndtr((below + HALF_BIN) * precision)
    log_lower = torch.special.log_ndtr((below - HALF_BIN) * precision)
    inner = log_upper + torch.log(-torch.expm1(log_lower - log_upper))
    lowest = torch.special.log_ndtr((centred + HALF_BIN) * precision)
    highest = torch.special.log_ndtr((HALF_BIN - centred) * precision)
    return torch.where(x < -OUTERMOST, lowest, torch.where(x > OUTERMOST, highest, inner))


def bits_per_dimension(nats: Tensor) -> Tensor:
    """Mean over all but the first axis, from nats to bits. (B, ...) -> (B,)"""
    return mean_per_sample(nats) / math.log(2.0)


def mean_per_sample(values: Tensor) -> Tensor:
    """Mean over all but the first axis. (B, ...) -> (B,)"""
    return values.flatten(1).mean(dim=1)
