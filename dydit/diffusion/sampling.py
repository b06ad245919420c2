"""Sampler: from noise to data with any model that takes (x, t, y)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dydit.diffusion.loss import split_output
from dydit.diffusion.schedulers import SamplingPlan, make_plan
from dydit.errors import ShapeError
from dydit.guidance import Denoiser, batch_labels, for_run, guided_output


class SamplerSettings(Protocol):
    """What is read of ``dydit.config.SamplerConfig``."""

    @property
    def name(self) -> str: ...

    @property
    def steps(self) -> int: ...

    @property
    def guidance_scale(self) -> float: ...

    @property
    def guided_channels(self) -> int | None: ...

    @property
    def num_train_timesteps(self) -> int: ...


@dataclass(frozen=True)
class Sampler:
    """A sampling method with its steps and guidance; holds no state, so one serves any number of threads.

    Made by :func:`make_sampler`.
    """

    plan: SamplingPlan
    learn_sigma: bool
    guidance_scale: float = 1.0
    guided_channels: int | None = 3

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timesteps of the steps, falling and without repetition: all that the model is ever given."""
        return tuple(call.leaves for call in self.plan.calls if call.leaves is not None)

    @property
    def call_timesteps(self) -> tuple[float, ...]:
        """The timestep of every forward of the model, in order; Heun's method asks for most of them twice."""
        return tuple(call.timestep for call in self.plan.calls)

    def trajectory(
        self,
        model: Denoiser,
        noise: Tensor,
        labels: Tensor,
        null_label: int | Tensor | None,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[float, Tensor]]:
        """Each timestep with the sample after the step that leaves it; the last sample is the result.

        Args:
            model: called as ``model(x, t, y)`` with t one Python number (int for diffusion, float
                for flow), under ``no_grad``, on 2B samples (with labels, then without) if guided.
            noise: (B, C, H, W), standard normal; its dtype and device are those of the trajectory.
            labels: (B,) int64, or texts (B, tokens, width), on the same device.
            null_label: the model's class for "no label", or its tokens (tokens, width) for no text.
            generator: source of the noise that DDPM adds; the other samplers are deterministic.

        Raises:
            ShapeError: if labels do not fit the noise, or the model's output does not fit
                ``learn_sigma``.
        """
        if noise.ndim != 4 or labels.shape[:1] != noise.shape[:1]:
            raise ShapeError(
                f"noise of shape {tuple(noise.shape)} with labels of shape {tuple(labels.shape)}",
                expected="(B, C, H, W) and (B,), or of texts (B, tokens, width)",
                remedy="give one label per sample, or one text",
            )
        return self._walk(model, noise, labels, null_label, generator)

    def sample(
        self,
        model: Denoiser,
        noise: Tensor,
        labels: Tensor,
        null_label: int | Tensor | None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """The end of :meth:`trajectory`: (B, C, H, W), same arguments and errors.

        Args:
            progress: show a bar over the steps.
        """
        steps = self.trajectory(model, noise, labels, null_label, generator)
        x = noise
        for _, after_step in tqdm(steps, total=len(self.timesteps), desc="sampling", disable=not progress):
            x = after_step
        return x

    @torch.no_grad()
    def _walk(
        self,
        model: Denoiser,
        x: Tensor,
        labels: Tensor,
        null_label: int | Tensor | None,
        generator: torch.Generator | None,
    ) -> Iterator[tuple[float, Tensor]]:
        model = for_run(model, self.call_timesteps, batch_labels(labels, null_label, self.guidance_scale))
        scheduler = self.plan.new_scheduler()
        # The scheduler has a clock of its own; its ticks stay on the CPU, so no step waits for the device.
        for call, tick in zip(self.plan.calls, scheduler.timesteps.tolist(), strict=True):
            output = guided_output(
                model,
                x,
                call.timestep,
                labels,
                null_label,
                scale=self.guidance_scale,
                guided_channels=self.guided_channels,
            )
            mean, _ = split_output(output, x.shape[1], self.learn_sigma)
            answer = output if self.plan.uses_variance else mean
            x = scheduler.step(answer, tick, x, generator=generator, return_dict=False)[0]
            if call.leaves is not None:
                yield call.leaves, x


def make_sampler(settings: SamplerSettings, learn_sigma: bool) -> Sampler:
    """The sampler that the settings name.

    Args:
        settings: name (``ddim``, ``ddpm``, ``dpm++``, ``flow_euler``, ``flow_heun``), steps,
            num_train_timesteps, guidance_scale, guided_channels (first n; None: all).
        learn_sigma: whether the model has variance channels. DDPM draws with them; the others
            leave them out.

    Raises:
        ConfigError: for an unknown name, or steps that do not fit the training timesteps.
    """
    plan = make_plan(settings.name, settings.steps, settings.num_train_timesteps, learn_sigma)
    return Sampler(plan, learn_sigma, settings.guidance_scale, settings.guided_channels)
