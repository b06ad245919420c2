"""The Improved DDPM objective: noise prediction, with the variance learned by the variational bound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dydit.diffusion import process
from dydit.diffusion.betas import linear_betas
from dydit.diffusion.gaussian import (
    bits_per_dimension,
    discretised_gaussian_log_likelihood,
    gaussian_kl,
    mean_per_sample,
)
from dydit.diffusion.loss import DiffusionLoss, in_full_precision, split_output
from dydit.diffusion.process import DiffusionTables, diffusion_tables
from dydit.diffusion.timesteps import stratified_uniform, to_timesteps, uniform

# L_hybrid = L_simple + λ L_vlb (Improved DDPM, eq. 16); L_vlb is T times the one term that is drawn.
VB_WEIGHT = 1e-3


@dataclass(frozen=True)
class IDDPMObjective:
    """loss = mse + vb · T/1000 on the linear schedule (Nichol & Dhariwal, *Improved DDPM*, section 3.1).

    Args:
        num_timesteps: T, at least 21.
        learn_sigma: whether the model has variance channels; without them the loss is the mse.
        stratified: draw t from four equal ranges per batch.

    Raises:
        ConfigError: for too short a schedule.
    """

    num_timesteps: int = 1000
    learn_sigma: bool = True
    stratified: bool = True

    def __post_init__(self) -> None:
        linear_betas(self.num_timesteps)  # an impossible schedule is refused here, not in the first step

    def sample_t(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Timesteps for a batch, uniform on 0 ... T−1. (B,) int64"""
        draw = stratified_uniform if self.stratified else uniform
        return to_timesteps(draw(batch, generator=generator, device=device), self.num_timesteps)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε. (B, C, H, W), in the data's dtype"""
        return process.add_noise(self._tables(x0), x0, noise, t).to(x0.dtype)

    def loss(self, model_output: Tensor, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> DiffusionLoss:
        """The hybrid loss per sample, in float32 or better.

        Args:
            model_output: (B, 2C, H, W): ε, then v; (B, C, H, W) without ``learn_sigma``.
            x0, x_t, noise: (B, C, H, W), with ``x_t = corrupt(x0, noise, t)``.
            t: (B,) int64.

        Raises:
            ShapeError: for another number of output channels.
        """
        epsilon, v = split_output(in_full_precision(model_output), x0.shape[1], self.learn_sigma)
        mse = mean_per_sample((noise - epsilon).square())
        if v is None:
            return DiffusionLoss(total=mse, mse=mse)
        # The mean learns from the mse alone: the bound's gradient on it is far noisier (section 3.1).
        vb = variational_bound(self._tables(x0), epsilon.detach(), v, x0, x_t, t)
        return DiffusionLoss(total=mse + vb * (VB_WEIGHT * self.num_timesteps), mse=mse, vb=vb)

    def _tables(self, x: Tensor) -> DiffusionTables:
        return diffusion_tables(self.num_timesteps, x.device)


def variational_bound(
    tables: DiffusionTables, epsilon: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """One term of the bound per sample, in bits per dimension (DDPM, eq. 5; Improved DDPM, eq. 4 to 6).

    KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)) for t > 0; at t = 0 the negative log-likelihood
    of x_0 under the discretised p_θ(x_0 | x_1).

    Args:
        epsilon, v: (B, C, H, W), the model's noise prediction and variance channels.
        x0, x_t: (B, C, H, W); t: (B,) int64.

    Returns:
        (B,)
    """
    mean = process.predicted_mean(tables, x_t, epsilon, t)
    log_variance = process.interpolated_log_variance(tables, v, t)
    true_mean = process.posterior_mean(tables, x0, x_t, t)
    true_log_variance = process.at_timestep(tables.log_posterior, t, x0.ndim)
    divergence = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    decoder_nll = -discretised_gaussian_log_likelihood(in_full_precision(x0), mean, log_variance)
    return torch.where(t == 0, bits_per_dimension(decoder_nll), bits_per_dimension(divergence))
