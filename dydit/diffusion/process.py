"""The diffusion process on tensors: noising, its posterior, and the Gaussian the model predicts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dydit.diffusion.betas import (
    Float64Array,
    clipped_log_posterior_variances,
    linear_betas,
    signal_levels,
)


@dataclass(frozen=True)
class DiffusionTables:
    """Coefficients of the process per timestep: (T,) float32 tensors on one device.

    Attributes:
        signal, noise: √ᾱ_t and √(1 − ᾱ_t), of x_0 and ε in x_t.
        posterior_x0, posterior_xt: of x_0 and x_t in the mean of q(x_{t−1} | x_t, x_0).
        mean_xt, mean_noise: of x_t and ε_θ in the mean of p_θ(x_{t−1} | x_t).
        log_beta, log_posterior: log β_t and log β̃_t (its first value clipped to the second).
    """

    signal: Tensor
    noise: Tensor
    posterior_x0: Tensor
    posterior_xt: Tensor
    mean_xt: Tensor
    mean_noise: Tensor
    log_beta: Tensor
    log_posterior: Tensor


def _table_arrays(betas: Float64Array) -> dict[str, Float64Array]:
    level = signal_levels(betas)
    previous = np.append(1.0, level[:-1])
    root_alpha = np.sqrt(1.0 - betas)
    return {
        "signal": np.sqrt(level),
        "noise": np.sqrt(1.0 - level),
        "posterior_x0": np.sqrt(previous) * betas / (1.0 - level),
        "posterior_xt": root_alpha * (1.0 - previous) / (1.0 - level),
        "mean_xt": 1.0 / root_alpha,
        "mean_noise": betas / (root_alpha * np.sqrt(1.0 - level)),
        "log_beta": np.log(betas),
        "log_posterior": clipped_log_posterior_variances(betas),
    }


@lru_cache(maxsize=16)
def diffusion_tables(num_timesteps: int, device: torch.device) -> DiffusionTables:
    """The tables of the linear schedule on a device, made once: copying them each step would wait for it.

    Raises:
        ConfigError: for a schedule shorter than :func:`linear_betas` allows.
    """
    arrays = _table_arrays(linear_betas(num_timesteps))
    return DiffusionTables(
        **{name: torch.from_numpy(values.astype(np.float32)).to(device) for name, values in arrays.items()}
    )


def at_timestep(table: Tensor, t: Tensor, ndim: int) -> Tensor:
    """Each sample's coefficient, shaped to broadcast. (T,), (B,) int64 -> (B, 1, ..., 1)"""
    return table[t].reshape(-1, *[1] * (ndim - 1))


def add_noise(tables: DiffusionTables, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε (DDPM, eq. 4). (B, C, H, W)"""
    return at_timestep(tables.signal, t, x0.ndim) * x0 + at_timestep(tables.noise, t, x0.ndim) * noise


def posterior_mean(tables: DiffusionTables, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Mean of q(x_{t−1} | x_t, x_0) (DDPM, eq. 7). (B, C, H, W)"""
    return (
        at_timestep(tables.posterior_x0, t, x0.ndim) * x0 + at_timestep(tables.posterior_xt, t, x0.ndim) * x_t
    )


def predicted_mean(tables: DiffusionTables, x_t: Tensor, predicted_noise: Tensor, t: Tensor) -> Tensor:
    """Mean of p_θ(x_{t−1} | x_t) from the predicted noise (DDPM, eq. 11). (B, C, H, W)"""
    return (
        at_timestep(tables.mean_xt, t, x_t.ndim) * x_t
        - at_timestep(tables.mean_noise, t, x_t.ndim) * predicted_noise
    )


def interpolated_log_variance(tables: DiffusionTables, v: Tensor, t: Tensor) -> Tensor:
    """log Σ_θ between log β̃_t (v = −1) and log β_t (v = 1) (Improved DDPM, eq. 15). (B, C, H, W)

    v is not clipped: the paper leaves it free, and finds that it stays inside by itself.
    """
    share = 0.5 * (v + 1.0)
    upper = at_timestep(tables.log_beta, t, v.ndim)
    lower = at_timestep(tables.log_posterior, t, v.ndim)
    return share * upper + (1.0 - share) * lower
