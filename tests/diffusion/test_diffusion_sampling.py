"""Samplers against models whose answers are known in closed form: data at one point, or Gaussian data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from dydit.config import SamplerConfig
from dydit.diffusion import Denoiser, Sampler, make_sampler
from dydit.diffusion.betas import linear_betas, signal_levels
from dydit.errors import ConfigError, ShapeError

LEVEL = signal_levels(linear_betas(1000))
MEAN, SPREAD = 0.5, 0.3  # of the Gaussian data
DETERMINISTIC_DIFFUSION = ["ddim", "dpm++"]
FLOW = ["flow_euler", "flow_heun"]
ALL = [*DETERMINISTIC_DIFFUSION, "ddpm", *FLOW]
LABELS = torch.tensor([0, 1, 2])
NULL = 9


def sampler_of(name: Any, steps: int = 10, learn_sigma: bool = False, **settings: Any) -> Sampler:
    return make_sampler(SamplerConfig(name=name, steps=steps, **settings), learn_sigma)


def start(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape or (3, 4, 2, 6), generator=torch.Generator().manual_seed(seed))


def noise_of_point(x: torch.Tensor, t: float, point: float) -> torch.Tensor:
    level = LEVEL[int(t)]
    return (x - math.sqrt(level) * point) / math.sqrt(1 - level)


def noise_of_gaussian(x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
    """E[ε | x_t] for N(MEAN, SPREAD²) data."""
    level = LEVEL[int(t)]
    return math.sqrt(1 - level) * (x - math.sqrt(level) * MEAN) / (level * SPREAD**2 + 1 - level)


def velocity_of_gaussian(x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
    """E[ε − x_0 | x_s] for N(MEAN, SPREAD²) data, s = t / 1000."""
    s = t / 1000
    score = (x - (1 - s) * MEAN) / ((1 - s) ** 2 * SPREAD**2 + s**2)
    return s * score - (MEAN + (1 - s) * SPREAD**2 * score)


def label_model(x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x + y.reshape(-1, 1, 1, 1) + t / 1000)


# --- where the samplers end ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DETERMINISTIC_DIFFUSION, "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_diffusion_ends_at_the_only_data_point(name: str, steps: int) -> None:
    x0 = sampler_of(name, steps).sample(lambda x, t, y: noise_of_point(x, t, 0.7), start(), LABELS, NULL)
    torch.testing.assert_close(x0, torch.full_like(x0, 0.7), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_flow_ends_at_the_only_data_point(name: str, steps: int) -> None:
    x0 = sampler_of(name, steps).sample(lambda x, t, y: (x - 0.7) / (t / 1000), start(), LABELS, NULL)
    torch.testing.assert_close(x0, torch.full_like(x0, 0.7), rtol=0, atol=1e-5)


def error_on_gaussian(name: str, steps: int) -> float:
    """Largest distance from the exact flow map, which takes a Gaussian's quantiles to the other's."""
    x = start()
    if name.startswith("flow"):
        exact, model = MEAN + SPREAD * x, velocity_of_gaussian
    else:
        level = LEVEL[-1]
        spread_at_end = math.sqrt(level * SPREAD**2 + 1 - level)
        exact = MEAN + SPREAD * (x - math.sqrt(level) * MEAN) / spread_at_end
        model = noise_of_gaussian
    x0 = sampler_of(name, steps).sample(model, x, LABELS, NULL)
    return (x0 - exact).abs().max().item()


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("flow_euler", 1), ("flow_heun", 2)])
def test_errors_fall_with_the_order_of_the_method(name: str, order: int) -> None:
    coarse, middle, fine = (error_on_gaussian(name, steps) for steps in (20, 40, 80))
    assert fine < 0.06
    for worse, better in pairwise((coarse, middle, fine)):
        assert 0.75 * 2**order < worse / better < 1.35 * 2**order


def test_second_order_beats_first() -> None:
    assert error_on_gaussian("dpm++", 80) < 0.1 * error_on_gaussian("ddim", 80)
    assert error_on_gaussian("flow_heun", 20) < 0.3 * error_on_gaussian("flow_euler", 39)  # as many calls


@pytest.mark.parametrize("steps", [5, 17, 250])
def test_ddim_is_its_equation(steps: int) -> None:
    """DDIM, eq. 12 with σ = 0, in float64 on the timesteps the sampler names."""
    sampler = sampler_of("ddim", steps)
    x = start().double().numpy()
    levels = [*(LEVEL[int(t)] for t in sampler.timesteps), 1.0]
    for t, level, next_level in zip(sampler.timesteps, levels[:-1], levels[1:], strict=True):
        epsilon = np.tanh(x + t / 1000)
        x0 = (x - np.sqrt(1 - level) * epsilon) / np.sqrt(level)
        x = np.sqrt(next_level) * x0 + np.sqrt(1 - next_level) * epsilon
    ours = sampler.sample(label_model, start(), torch.zeros(3, dtype=torch.int64), NULL)
    np.testing.assert_allclose(ours.numpy(), x, rtol=2e-3, atol=2e-3)


def gaussian_with_its_variance(sampler: Sampler) -> Denoiser:
    """ε and the v that makes each reverse step exact: Var[x_s | x_t] = β̃ + (∂mean/∂x_0)² Var[x_0 | x_t]."""
    previous = dict(pairwise(sampler.timesteps))

    def model(x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
        level, before = LEVEL[int(t)], LEVEL[int(previous[t])] if t in previous else 1.0
        beta = 1 - level / before
        v = 0.0  # the last step adds no noise
        if t in previous:
            beta_tilde = beta * (1 - before) / (1 - level)
            left_open = 1 / (1 / SPREAD**2 + level / (1 - level))
            variance = beta_tilde + before * (beta / (1 - level)) ** 2 * left_open
            v = 2 * math.log(variance / beta_tilde) / math.log(beta / beta_tilde) - 1
        return torch.cat([noise_of_gaussian(x, t, y), torch.full_like(x, v)], dim=1)

    return model


@pytest.mark.parametrize("steps", [4, 10, 100])
def test_ddpm_with_the_learned_range_draws_the_data_s_distribution(steps: int) -> None:
    """With the exact variance, ancestral sampling of Gaussian data is exact for any number of steps."""
    sampler = sampler_of("ddpm", steps, learn_sigma=True)
    noise, labels = start(64, 4, 8, 8), torch.zeros(64, dtype=torch.int64)
    generator = torch.Generator().manual_seed(1)
    x0 = sampler.sample(gaussian_with_its_variance(sampler), noise, labels, NULL, generator)
    count = x0.numel()
    assert x0.mean().item() == pytest.approx(MEAN, abs=4.5 * SPREAD / math.sqrt(count))
    assert x0.std().item() == pytest.approx(SPREAD, rel=4.5 / math.sqrt(2 * count) + 1e-3)


def test_ddpm_adds_the_noise_the_range_asks_for() -> None:
    """One step from 999: v = -1 and v = 1 scatter by the square roots of β̃ and β of that (long) step."""
    sampler = sampler_of("ddpm", 10, learn_sigma=True)
    noise, labels = torch.zeros(64, 4, 8, 8), torch.zeros(64, dtype=torch.int64)
    level, before = LEVEL[999], LEVEL[int(sampler.timesteps[1])]
    beta = 1 - level / before
    for v, variance in ((-1.0, beta * (1 - before) / (1 - level)), (1.0, beta)):
        output = torch.cat([torch.zeros_like(noise), torch.full_like(noise, v)], dim=1)
        generator = torch.Generator().manual_seed(2)
        _, x = next(sampler.trajectory(lambda *_, out=output: out, noise, labels, NULL, generator))
        assert x.std().item() == pytest.approx(math.sqrt(variance), rel=0.025)


# --- how they walk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_the_model_is_called_as_announced(name: str, learn_sigma: bool) -> None:
    seen: list[float] = []

    def model(x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
        assert x.shape == (3, 5, 2, 6) and torch.equal(y, LABELS)
        assert type(t) is (float if name.startswith("flow") else int)
        assert not torch.is_grad_enabled()
        seen.append(t)
        return torch.cat([x, torch.zeros_like(x)], dim=1) if learn_sigma else x

    sampler = sampler_of(name, 7, learn_sigma)
    trajectory = []
    for step in sampler.trajectory(model, start(3, 5, 2, 6), LABELS, NULL):
        assert torch.is_grad_enabled()  # the caller's own setting, between steps too
        trajectory.append(step)
    assert tuple(seen) == sampler.call_timesteps
    assert tuple(t for t, _ in trajectory) == sampler.timesteps
    assert set(seen) == set(sampler.timesteps) and len(sampler.timesteps) == 7
    assert len(seen) == (13 if name == "flow_heun" else 7)
    assert all(x.shape == (3, 5, 2, 6) and torch.isfinite(x).all() for _, x in trajectory)


@pytest.mark.parametrize("name", ALL)
def test_a_sampler_serves_two_trajectories_at_once(name: str) -> None:
    sampler = sampler_of(name, 6)

    def run(seed: int) -> Iterator[tuple[float, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return sampler.trajectory(label_model, start(seed=seed), LABELS, NULL, generator)

    alone = [[x for _, x in run(seed)] for seed in (1, 2)]
    together = list(zip(run(1), run(2), strict=True))
    for k, ((_, first), (_, second)) in enumerate(together):
        torch.testing.assert_close(first, alone[0][k], rtol=0, atol=0)
        torch.testing.assert_close(second, alone[1][k], rtol=0, atol=0)


def test_the_generator_decides_what_ddpm_draws() -> None:
    sampler = sampler_of("ddpm", 5)

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sampler.sample(label_model, start(), LABELS, NULL, generator)

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


@pytest.mark.parametrize("name", ALL)
def test_learned_variance_matters_to_ddpm_alone(name: str) -> None:
    def with_variance(v: float) -> torch.Tensor:
        def model(x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
            return torch.cat([label_model(x, t, y), torch.full_like(x, v)], dim=1)

        generator = torch.Generator().manual_seed(0)
        return sampler_of(name, 5, learn_sigma=True).sample(model, start(), LABELS, NULL, generator)

    assert torch.equal(with_variance(-1.0), with_variance(1.0)) == (name != "ddpm")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("guided_channels", [1, 3, None])
def test_guidance_is_that_of_a_model_which_guides_itself(name: str, guided_channels: int | None) -> None:
    n = guided_channels or 4

    def guided_model(x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
        conditional, null = label_model(x, t, y), label_model(x, t, torch.full_like(y, NULL))
        conditional[:, :n] = null[:, :n] + 2.5 * (conditional[:, :n] - null[:, :n])
        return conditional

    guided = sampler_of(name, 6, guidance_scale=2.5, guided_channels=guided_channels)
    plain = sampler_of(name, 6)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    ours = guided.sample(label_model, start(), LABELS, NULL, generators[0])
    expected = plain.sample(guided_model, start(), LABELS, NULL, generators[1])
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_no_step_reads_back_from_the_device(name: str) -> None:
    """A meta tensor has no values: reading one raises, where on a GPU it would wait for the device."""
    noise, labels = torch.empty(2, 4, 4, 8, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    sampler = sampler_of(name, 4, learn_sigma=True, guidance_scale=4.0)
    x0 = sampler.sample(lambda x, t, y: torch.cat([x, x], dim=1), noise, labels, NULL)
    assert x0.shape == noise.shape and x0.device.type == "meta"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trajectory_keeps_the_noise_s_dtype(name: str, dtype: torch.dtype) -> None:
    def half_model(x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
        assert x.dtype == dtype
        return x.bfloat16()

    for _, x in sampler_of(name, 4).trajectory(half_model, start().to(dtype), LABELS, NULL):
        assert x.dtype == dtype


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "labels"), [((3, 4, 2, 6), 2), ((3, 4, 12), 3)])
def test_labels_that_do_not_fit_are_refused_at_once(shape: tuple[int, ...], labels: int) -> None:
    with pytest.raises(ShapeError, match="noise of shape .* labels of shape .*one label per sample"):
        sampler_of("ddim").trajectory(label_model, torch.zeros(shape), LABELS[:labels], NULL)


def test_a_model_with_unannounced_variance_is_refused() -> None:
    with pytest.raises(ShapeError, match="8, 2, 6.*expected 4 channels with learn_sigma=False"):
        sampler_of("dpm++").sample(lambda x, t, y: torch.cat([x, x], 1), start(), LABELS, NULL)


def test_settings_are_checked_when_the_sampler_is_made() -> None:
    with pytest.raises(ConfigError, match="at most 999"):
        sampler_of("dpm++", 1000)


def test_progress_is_shown_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    sampler = sampler_of("ddim", 3)
    sampler.sample(label_model, start(), LABELS, NULL)
    assert capsys.readouterr().err == ""
    sampler.sample(label_model, start(), LABELS, NULL, progress=True)
    assert "sampling" in capsys.readouterr().err
