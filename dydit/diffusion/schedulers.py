"""Sampling plans: the timesteps a model is asked for, and the diffusers scheduler that takes its answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from dydit.diffusion.betas import linear_betas
from dydit.errors import ConfigError


@dataclass(frozen=True)
class ModelCall:
    """One forward of the model within a trajectory.

    Attributes:
        timestep: what the model is given.
        leaves: the timestep whose step is complete after this call; None for a predictor (Heun).
    """

    timestep: float
    leaves: float | None


@dataclass(frozen=True)
class SamplingPlan:
    """A walk from noise to data, before any model is there.

    Attributes:
        calls: every forward, in order.
        new_scheduler: a diffusers scheduler in its first state; its ``timesteps`` pair with ``calls``.
        uses_variance: whether the scheduler takes the variance channels along.
    """

    calls: tuple[ModelCall, ...]
    new_scheduler: Callable[[], Any]
    uses_variance: bool = False


def inclusive_timesteps(num_train_timesteps: int, steps: int) -> tuple[int, ...]:
    """Evenly spaced from T−1 down to 0, both included (250 steps of 1000: 999, 995, ..., 4, 0).

    A single step starts at T−1, where the noise is; diffusers' own "linspace" would give 0.
    """
    if steps == 1:
        return (num_train_timesteps - 1,)
    return tuple(int(t) for t in np.linspace(0, num_train_timesteps - 1, steps).round()[::-1])


def plan_ddpm(steps: int, num_train_timesteps: int, learn_sigma: bool) -> SamplingPlan:
    """Ancestral sampling (DDPM, algorithm 2), on fewer steps as in Improved DDPM, section 4."""
    timesteps = inclusive_timesteps(num_train_timesteps, steps)

    def new_scheduler() -> DDPMScheduler:
        scheduler = DDPMScheduler(
            num_train_timesteps=num_train_timesteps,
            trained_betas=linear_betas(num_train_timesteps).tolist(),
            variance_type="learned_range" if learn_sigma else "fixed_small",
            clip_sample=False,  # latents are not confined to [−1, 1]
        )
        scheduler.set_timesteps(timesteps=list(timesteps))
        return scheduler

    return SamplingPlan(_one_call_per_step(timesteps), new_scheduler, uses_variance=learn_sigma)


def plan_ddim(steps: int, num_train_timesteps: int, learn_sigma: bool) -> SamplingPlan:
    """Deterministic DDIM (Song et al., eq. 12 with σ = 0), from T−1 to 0.

    DDIM is DPM-Solver++ of first order (Lu et al., 2022), and run as such: diffusers'
    DDIMScheduler steps by T // steps whatever its timesteps are, which is wrong for any spacing
    that includes both ends.
    """
    timesteps = inclusive_timesteps(num_train_timesteps, steps)
    solver = _new_dpm_solver(timesteps, num_train_timesteps, order=1)
    return SamplingPlan(_one_call_per_step(timesteps), solver)


def plan_dpm_solver(steps: int, num_train_timesteps: int, learn_sigma: bool) -> SamplingPlan:
    """DPM-Solver++ 2M (Lu et al., algorithm 2); its last step leads from the lowest timestep to the data.

    Raises:
        ConfigError: if steps equals the training timesteps: there is then no even spacing without 0.
    """
    if steps >= num_train_timesteps:
        raise ConfigError(
            f"{steps} steps of dpm++ over {num_train_timesteps} training timesteps",
            expected=f"at most {num_train_timesteps - 1}",
            remedy="ask for fewer steps (20 are common), or choose ddim",
        )
    timesteps = inclusive_timesteps(num_train_timesteps, steps + 1)[:-1]
    solver = _new_dpm_solver(timesteps, num_train_timesteps, order=2)
    return SamplingPlan(_one_call_per_step(timesteps), solver)


def plan_flow_euler(steps: int, num_train_timesteps: int, learn_sigma: bool) -> SamplingPlan:
    """Euler's method on the flow's ODE, in equal steps from noise (t = T) to data (Ma et al., *SiT*)."""
    times = _flow_times(steps, num_train_timesteps)
    solver = _new_flow_scheduler(FlowMatchEulerDiscreteScheduler, steps)
    return SamplingPlan(_one_call_per_step(times), solver)


def plan_flow_heun(steps: int, num_train_timesteps: int, learn_sigma: bool) -> SamplingPlan:
    """Heun's method on the flow's ODE, in equal steps; the last is Euler's (Karras et al., EDM, algorithm 1).

    ``steps`` steps are 2·steps − 1 calls: each step but the last asks the model again where it lands.
    """
    times = _flow_times(steps, num_train_timesteps)
    calls: list[ModelCall] = []
    for start, end in zip(times[:-1], times[1:], strict=True):
        calls += [ModelCall(start, leaves=None), ModelCall(end, leaves=start)]
    calls.append(ModelCall(times[-1], leaves=times[-1]))
    solver = _new_flow_scheduler(FlowMatchHeunDiscreteScheduler, steps)
    return SamplingPlan(tuple(calls), solver)


_PLANS: dict[str, Callable[[int, int, bool], SamplingPlan]] = {
    "ddim": plan_ddim,
    "ddpm": plan_ddpm,
    "dpm++": plan_dpm_solver,
    "flow_euler": plan_flow_euler,
    "flow_heun": plan_flow_heun,
}


def make_plan(name: str, steps: int, num_train_timesteps: int, learn_sigma: bool) -> SamplingPlan:
    """The plan of a sampler by name.

    Raises:
        ConfigError: for an unknown name, or steps outside 1 ... num_train_timesteps.
    """
    if name not in _PLANS:
        raise ConfigError(f"sampler {name!r}", expected=f"one of {', '.join(_PLANS)}")
    if not 1 <= steps <= num_train_timesteps:
        raise ConfigError(
            f"{steps} sampling steps with {num_train_timesteps} training timesteps",
            expected=f"1 to {num_train_timesteps} steps",
            remedy="set steps within that range",
        )
    return _PLANS[name](steps, num_train_timesteps, learn_sigma)


def _one_call_per_step(timesteps: tuple[int, ...] | tuple[float, ...]) -> tuple[ModelCall, ...]:
    return tuple(ModelCall(t, leaves=t) for t in timesteps)


def _new_dpm_solver(
    timesteps: tuple[int, ...], num_train_timesteps: int, order: int
) -> Callable[[], DPMSolverMultistepScheduler]:
    def new_scheduler() -> DPMSolverMultistepScheduler:
        # No variance_type: it would cut the model's output to three channels, whatever the latent has.
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=num_train_timesteps,
            trained_betas=linear_betas(num_train_timesteps).tolist(),
            algorithm_type="dpmsolver++",
            solver_order=order,
        )
        scheduler.set_timesteps(timesteps=list(timesteps))
        return scheduler

    return new_scheduler


def _flow_times(steps: int, num_train_timesteps: int) -> tuple[float, ...]:
    """T, T·(S−1)/S, ..., T/S: the start of each of S equal steps."""
    return tuple(num_train_timesteps * (steps - k) / steps for k in range(steps))


def _new_flow_scheduler(scheduler_class: type[Any], steps: int) -> Callable[[], Any]:
    def new_scheduler() -> Any:
        # The scheduler's clock ticks once per step, which spaces its sigmas S/S, ..., 1/S and then 0.
        # With T ticks they would end at 1/T, and the last step would be next to nothing.
        scheduler = scheduler_class(num_train_timesteps=steps)
        scheduler.set_timesteps(steps)
        return scheduler

    return new_scheduler
