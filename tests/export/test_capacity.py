"""Capacities are the mean of what the threshold keeps; their difference is measured on the masked model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibration_builders import SHAPE, STEPS, routed_dydit, sampler_of, some_recording
from core_builders import small_dydit
from hypothesis import given
from hypothesis import strategies as st

from dydit.config import DyDiTConfig
from dydit.costs import static_macs
from dydit.errors import ConfigError
from dydit.export.calibration import calibrate
from dydit.export.capacity import choose_capacities
from dydit.export.recording import Start, record
from dydit.export.schedule import SubnetSchedule
from dydit.export.thresholds import Thresholds
from dydit.runtime.engine import SubnetEngine

MIDDLE = Thresholds(0.5, 0.5)


@given(seed=st.integers(0, 1000), threshold=st.floats(0.05, 0.95))
def test_the_rounded_mean(seed: int, threshold: float) -> None:
    recording = some_recording(seed)
    capacities = choose_capacities(recording, Thresholds(0.5, threshold))
    assert capacities.dtype == np.int32 and capacities.shape == (STEPS, SHAPE.depth)
    means = recording.kept_tokens(Thresholds(0.5, threshold)).double().mean(1).numpy()
    assert (np.abs(capacities - means) <= 0.5).all()


@given(seed=st.integers(0, 1000), threshold=st.floats(0.01, 0.99), multiple=st.integers(1, SHAPE.tokens))
def test_multiples(seed: int, threshold: float, multiple: int) -> None:
    recording = some_recording(seed)
    N = SHAPE.tokens
    allowed = np.array(sorted({*range(0, N + 1, multiple), N}))
    means = recording.kept_tokens(Thresholds(0.5, threshold)).double().mean(1).numpy()
    capacities = choose_capacities(recording, Thresholds(0.5, threshold), multiple)
    assert np.isin(capacities, allowed).all()
    nearest = np.abs(means[..., None] - allowed).min(-1)
    assert np.abs(capacities - means) == pytest.approx(nearest)


def test_none_and_all() -> None:
    recording = some_recording(0)
    for threshold, expected in ((1 - 1e-12, 0), (1e-12, SHAPE.tokens)):
        for multiple in (1, 3, SHAPE.tokens):
            assert (choose_capacities(recording, Thresholds(0.5, threshold), multiple) == expected).all()
    for multiple in (0, SHAPE.tokens + 1):
        with pytest.raises(
            ConfigError, match=f"multiples of {multiple}; expected 1 to the model's 16 tokens"
        ):
            choose_capacities(recording, MIDDLE, multiple)


def test_a_timestep_that_is_called_twice_has_one_capacity() -> None:
    """Heun's method asks for most timesteps twice."""
    model = routed_dydit()
    sampler = sampler_of(model, "flow_heun", steps=3)
    recording = record(model, sampler, Start.draw(model, 4, seed=0))
    kept = recording.kept_tokens(MIDDLE).double().mean(1).numpy()  # (R, L)
    timesteps = np.array(sampler.call_timesteps)
    means = np.stack([kept[timesteps == t].mean(0) for t in sampler.timesteps])
    capacities = choose_capacities(recording, MIDDLE)
    assert len(kept) == 5 and capacities.shape == (3, 3)
    assert (np.abs(capacities - means) <= 0.5).all()


def test_the_difference_is_that_of_the_engines_two_modes() -> None:
    model = routed_dydit()
    sampler = sampler_of(model)
    found = calibrate(model, sampler, 0.6, samples=4, capacity_multiple=1)
    assert found.chosen is not None and found.capacities is not None
    schedule = SubnetSchedule.from_model(model, sampler.timesteps, capacities=found.capacities)
    exact, capacity = (SubnetEngine(model, schedule, mode=mode) for mode in ("exact", "capacity"))
    start = Start.draw(model, 4, seed=0)
    recording = record(model, sampler, start)
    differences = []
    for call in recording.calls:
        expected = exact(call.x, call.t, call.y)
        differences.append(((capacity(call.x, call.t, call.y) - expected).norm() / expected.norm()).item())
    assert found.chosen.call_difference == pytest.approx(np.mean(differences), rel=1e-3)
    one, other = (start.walk(sampler, engine, model.null_label) for engine in (exact, capacity))
    assert found.chosen.sample_difference == pytest.approx(
        ((one - other).norm() / one.norm()).item(), rel=1e-2
    )
    assert found.chosen.call_difference > 1e-4
    ratio = schedule.macs_per_timestep(found.capacities).mean() / static_macs(model.shape)
    assert found.chosen.ratio == pytest.approx(ratio, rel=1e-12)
    assert found.chosen.ratio == pytest.approx(found.ratio_after, rel=0.02)


@pytest.mark.parametrize("config", [DyDiTConfig(token_routing=False), DyDiTConfig(token_router_ratio=4)])
def test_where_every_token_is_kept_there_is_no_difference(config: DyDiTConfig) -> None:
    model = small_dydit(config=config, mixed=False)  # converted: all open
    found = calibrate(model.train(), sampler_of(model), None, samples=2, capacity_multiple=5)
    assert found.chosen is not None and (found.chosen.tokens == model.shape.tokens).all()
    assert (found.chosen.call_difference, found.chosen.sample_difference) == (0.0, 0.0)
    assert found.chosen.ratio == found.ratio_after and model.training


def test_capacities_at_the_thresholds_as_they_are() -> None:
    model = routed_dydit()
    model.set_thresholds(0.4, 0.7)
    found = calibrate(model, sampler_of(model), None, samples=4, capacity_multiple=1)
    assert found.before == found.after == Thresholds(0.4, 0.7) == Thresholds.of(model)
    recording = record(model, sampler_of(model), Start.draw(model, 4, seed=0))
    assert torch.equal(
        torch.from_numpy(found.capacities), torch.from_numpy(choose_capacities(recording, found.after))
    )
