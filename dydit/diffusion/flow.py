"""The flow-matching objective: a straight path from data to noise, and its velocity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dydit.diffusion.gaussian import mean_per_sample
from dydit.diffusion.loss import DiffusionLoss, in_full_precision, split_output
from dydit.diffusion.timesteps import stratified_uniform, uniform
from dydit.errors import ConfigError


@dataclass(frozen=True)
class FlowObjective:
    """Velocity matching on x_s = (1 − s) x_0 + s ε (Ma et al., *SiT*, section 2: linear path).

    The model sees t = T·s, on the same scale as in diffusion, so that a backbone pretrained with
    diffusion keeps the range its timestep embedding knows.

    Args:
        num_timesteps: T, the t that stands for pure noise.
        learn_sigma: whether the model has variance channels; they are left out of the loss.
        stratified: draw t from four equal ranges per batch.

    Raises:
        ConfigError: for T below 1.
    """

    num_timesteps: int = 1000
    learn_sigma: bool = False
    stratified: bool = True

    def __post_init__(self) -> None:
        if self.num_timesteps < 1:
            raise ConfigError(
                f"{self.num_timesteps} timesteps",
                expected="at least 1",
                remedy="set the number of timesteps the model's t runs up to (published models use 1000)",
            )

    def sample_t(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Times for a batch, uniform on [0, T). (B,) float32"""
        draw = stratified_uniform if self.stratified else uniform
        return draw(batch, generator=generator, device=device) * self.num_timesteps

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_s = (1 − s) x_0 + s ε with s = t/T. (B, C, H, W), in the data's dtype"""
        s = (t / self.num_timesteps).reshape(-1, *[1] * (x0.ndim - 1))
        return ((1.0 - s) * x0 + s * noise).to(x0.dtype)

    def loss(self, model_output: Tensor, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> DiffusionLoss:
        """Squared error against the velocity ε − x_0, per sample, in float32 or better.

        Args:
            model_output: (B, C, H, W); with ``learn_sigma`` (B, 2C, H, W), whose second half is unused.
            x0, noise: (B, C, H, W). ``x_t`` and ``t`` are taken for the common signature.

        Raises:
            ShapeError: for another number of output channels.
        """
        velocity, _ = split_output(in_full_precision(model_output), x0.shape[1], self.learn_sigma)
        target = in_full_precision(noise) - in_full_precision(x0)
        mse = mean_per_sample((target - velocity).square())
        return DiffusionLoss(total=mse, mse=mse)
