"""The linear noise schedule, as plain float64 arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dydit.errors import ConfigError

Float64Array = npt.NDArray[np.float64]

# Ho et al., section 4: both ends of the linear schedule, given for 1000 timesteps.
BETA_START = 1e-4
BETA_END = 0.02
REFERENCE_TIMESTEPS = 1000


def linear_betas(num_timesteps: int) -> Float64Array:
    """Forward-process variances β_t that grow linearly (Ho et al., *DDPM*, section 4).

    For T other than 1000 both ends are scaled by 1000 / T. The signal left at the last timestep is
    then the same for any T; without it a short schedule would end far from pure noise.

    Args:
        num_timesteps: T, at least 21 (below, the scaled β would reach 1).

    Returns:
        (T,) float64, from 1e-4 to 0.02 for T = 1000.

    Raises:
        ConfigError: for fewer timesteps.
    """
    scale = REFERENCE_TIMESTEPS / max(num_timesteps, 1)
    if num_timesteps < 1 or scale * BETA_END >= 1:
        least = int(REFERENCE_TIMESTEPS * BETA_END) + 1
        raise ConfigError(
            f"a noise schedule of {num_timesteps} timesteps",
            expected=f"at least {least} (its last β would not stay below 1)",
            remedy=f"raise the number of timesteps (published models use {REFERENCE_TIMESTEPS})",
        )
    return np.linspace(scale * BETA_START, scale * BETA_END, num_timesteps, dtype=np.float64)


def signal_levels(betas: Float64Array) -> Float64Array:
    """ᾱ_t = Π (1 − β), the share of the data's variance left at each timestep (DDPM, eq. 4). (T,)"""
    return np.cumprod(1.0 - betas, dtype=np.float64)


def posterior_variances(betas: Float64Array) -> Float64Array:
    """β̃_t, the variance of q(x_{t−1} | x_t, x_0) (DDPM, eq. 7). (T,); the first is 0."""
    level = signal_levels(betas)
    previous = np.append(1.0, level[:-1])
    return betas * (1.0 - previous) / (1.0 - level)


def clipped_log_posterior_variances(betas: Float64Array) -> Float64Array:
    """log β̃_t, where the first value is the second's: β̃_0 is 0 and has no logarithm. (T,)"""
    variances = posterior_variances(betas)
    return np.log(np.append(variances[1], variances[1:]))
