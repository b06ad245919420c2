from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from dydit.diffusion.betas import linear_betas, signal_levels
from dydit.diffusion.schedulers import ModelCall, _new_dpm_solver, inclusive_timesteps, make_plan
from dydit.errors import ConfigError

DIFFUSION = ["ddim", "ddpm", "dpm++"]
FLOW = ["flow_euler", "flow_heun"]


def test_250_steps_hold_both_ends() -> None:
    timesteps = [call.timestep for call in make_plan("ddpm", 250, 1000, True).calls]
    assert len(timesteps) == 250 and timesteps[0] == 999 and timesteps[-1] == 0
    assert timesteps[:2] == [999, 995] and timesteps[-2:] == [4, 0]
    assert {a - b for a, b in zip(timesteps[:-1], timesteps[1:], strict=True)} == {4, 5}


@pytest.mark.parametrize("steps", [2, 7, 50, 100, 250, 333, 1000])
def test_the_spacing_is_diffusers_linspace(steps: int) -> None:
    scheduler = DDPMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    assert inclusive_timesteps(1000, steps) == tuple(scheduler.timesteps.tolist())


@given(st.data())
def test_any_number_of_steps_falls_strictly(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 1500))
    timesteps = inclusive_timesteps(total, data.draw(st.integers(1, total)))
    assert timesteps[0] == total - 1
    assert len(timesteps) == 1 or timesteps[-1] == 0
    assert all(a > b for a, b in zip(timesteps[:-1], timesteps[1:], strict=True))


@pytest.mark.parametrize("name", DIFFUSION)
@pytest.mark.parametrize("steps", [1, 2, 13, 999])
def test_a_diffusion_scheduler_s_clock_is_the_model_s(name: str, steps: int) -> None:
    plan = make_plan(name, steps, 1000, learn_sigma=True)
    assert plan.new_scheduler().timesteps.tolist() == [call.timestep for call in plan.calls]
    assert plan.calls[0].timestep == 999  # where the noise is, also for a single step
    assert all(type(call.timestep) is int and call.leaves == call.timestep for call in plan.calls)


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_flow_scheduler_s_sigma_is_the_model_s_time(name: str, steps: int) -> None:
    plan = make_plan(name, steps, 1000, learn_sigma=False)
    times = [call.timestep for call in plan.calls]
    scheduler = plan.new_scheduler()
    np.testing.assert_allclose(scheduler.timesteps / steps * 1000, times, rtol=1e-6)
    assert all(type(t) is float for t in times)
    starts = [call.leaves for call in plan.calls if call.leaves is not None]
    np.testing.assert_allclose(starts, 1000 * (1 - np.arange(steps) / steps))
    assert scheduler.sigmas[-1] == 0


def test_heun_asks_again_where_a_step_lands() -> None:
    assert make_plan("flow_heun", 3, 900, False).calls == (
        ModelCall(900.0, leaves=None),
        ModelCall(600.0, leaves=900.0),
        ModelCall(600.0, leaves=None),
        ModelCall(300.0, leaves=600.0),
        ModelCall(300.0, leaves=300.0),
    )


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_first_order_dpm_solver_is_diffusers_ddim(steps: int) -> None:
    """On the trailing spacing, where DDIMScheduler's fixed stride is right."""
    ddim = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    ddim.set_timesteps(steps)
    solver = _new_dpm_solver(tuple(ddim.timesteps.tolist()), 1000, order=1)()
    x = y = torch.randn(2, 4, 2, 6, dtype=torch.float32)
    for t in ddim.timesteps.tolist():
        x = ddim.step(torch.tanh(x + t / 1000), t, x).prev_sample
        y = solver.step(torch.tanh(y + t / 1000), t, y).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", DIFFUSION)
def test_schedulers_walk_the_schedule_that_was_trained(name: str) -> None:
    scheduler = make_plan(name, 20, 400, True).new_scheduler()
    np.testing.assert_allclose(scheduler.alphas_cumprod, signal_levels(linear_betas(400)), rtol=1e-5)


@pytest.mark.parametrize("name", DIFFUSION + FLOW)
@pytest.mark.parametrize(("steps", "total"), [(0, 1000), (-3, 1000), (1001, 1000), (30, 25)])
def test_steps_that_do_not_fit_are_refused(name: str, steps: int, total: int) -> None:
    expected = f"^{steps} sampling steps with {total} .*; expected 1 to {total} steps; set"
    with pytest.raises(ConfigError, match=expected):
        make_plan(name, steps, total, True)


def test_dpm_solver_needs_one_timestep_more_than_steps() -> None:
    with pytest.raises(ConfigError, match="100 steps of dpm.* over 100.*expected at most 99; ask for fewer"):
        make_plan("dpm++", 100, 100, True)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="sampler 'plms'; expected one of ddim, ddpm, dpm"):
        make_plan("plms", 10, 1000, True)
