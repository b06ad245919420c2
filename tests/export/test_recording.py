"""A recording's ratio is what the engine executes, and recording changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_builders import small_dydit, small_inputs

from dydit.compute.engine import count_engine
from dydit.config import DyDiTConfig, SamplerConfig
from dydit.costs import static_macs
from dydit.diffusion import Sampler, make_sampler
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ConfigError, ScheduleError, ShapeError
from dydit.export.recording import Recording, Start, record
from dydit.export.schedule import SubnetSchedule
from dydit.export.thresholds import Thresholds
from dydit.runtime.engine import SubnetEngine


def sampler_of(model: DyDiT, name: str = "ddim", steps: int = 3, guidance_scale: float = 1.5) -> Sampler:
    return make_sampler(
        SamplerConfig(name=name, steps=steps, guidance_scale=guidance_scale), model.shape.learn_sigma
    )


def recorded(model: DyDiT, sampler: Sampler, samples: int = 2, seed: int = 0) -> Recording:
    return record(model, sampler, Start.draw(model, samples, seed))


@pytest.mark.parametrize(
    ("name", "learn_sigma", "guidance_scale"),
    [("ddim", True, 1.5), ("ddpm", True, 1.0), ("dpm++", False, 2.0), ("flow_heun", False, 1.5)],
)
def test_the_ratio_is_what_the_engine_executes(name: str, learn_sigma: bool, guidance_scale: float) -> None:
    model = small_dydit(learn_sigma=learn_sigma)
    sampler = sampler_of(model, name, guidance_scale=guidance_scale)
    recording = recorded(model, sampler)
    assert [call.t for call in recording.calls] == list(sampler.call_timesteps)
    assert [sampler.timesteps[i] for i in recording.positions] == list(sampler.call_timesteps)
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, sampler.timesteps))
    shares = []
    for call, kept in zip(recording.calls, recording.kept_tokens(Thresholds.of(model)), strict=True):
        counted = count_engine(engine, call.x, call.t, call.y)
        assert counted.kept_tokens.tolist() == kept.tolist()
        shares.append(counted.counted.total / len(call.x) / static_macs(model.shape))
    assert recording.ratio(Thresholds.of(model)) == pytest.approx(np.mean(shares), rel=1e-12)


@pytest.mark.parametrize("conditioning", ["adaln_zero", "in_context", "cross_attention"])
def test_the_ratio_in_capacity_mode_is_what_the_engine_executes(conditioning: str) -> None:
    model = small_dydit(conditioning=conditioning)
    sampler = sampler_of(model)
    recording = recorded(model, sampler)
    capacities = np.array([[0, 3], [16, 5], [7, 0]], np.int32)
    schedule = SubnetSchedule.from_model(model, sampler.timesteps, capacities=capacities)
    engine = SubnetEngine(model, schedule, mode="capacity")
    counted = [count_engine(engine, c.x, c.t, c.y).counted.total / len(c.x) for c in recording.calls]
    expected = np.mean(counted) / static_macs(model.shape)
    ratio = recording.capacity_ratio(Thresholds.of(model), torch.from_numpy(capacities))
    assert ratio == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tokens", [0.1, 0.7, 0.95])
def test_other_thresholds_are_tried_without_the_model(tokens: float) -> None:
    """In one call of one block nothing follows a token's decision, so the logits stay the same."""
    model = small_dydit(depth=1)
    sampler = sampler_of(model, steps=1)
    predicted = recorded(model, sampler).ratio(Thresholds(0.5, tokens))
    model.set_thresholds(0.5, tokens)
    assert recorded(model, sampler).ratio(Thresholds.of(model)) == predicted


def test_recording_is_sampling() -> None:
    model = small_dydit().train()
    sampler, start = sampler_of(model, "ddpm"), Start.draw(model, 3, seed=5)
    state = torch.get_rng_state()
    recording = record(model, sampler, start)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    model.eval()
    generator = torch.Generator().manual_seed(5)
    expected = sampler.sample(model, start.noise, start.labels, model.null_label, generator)
    assert torch.equal(recording.samples, expected)
    assert torch.equal(recording.calls[0].x, torch.cat([start.noise] * 2))
    assert recording.calls[0].y.tolist() == [*start.labels.tolist(), 10, 10, 10]
    outputs = [model(call.x, call.t, call.y) for call in recording.calls]
    assert all(torch.equal(a, call.output) for a, call in zip(outputs, recording.calls, strict=True))


def test_a_seed_is_a_calibration_set() -> None:
    model = small_dydit()
    one, same, other = (Start.draw(model, 4, seed) for seed in (1, 1, 2))
    assert torch.equal(one.noise, same.noise) and torch.equal(one.labels, same.labels)
    assert not torch.equal(one.noise, other.noise)
    assert Start.draw(model.double(), 4, 1).noise.dtype == torch.float64


@pytest.mark.parametrize("router", ["head_router", "group_router", "token_router"])
def test_nan_is_refused_naming_the_block(router: str) -> None:
    model = small_dydit(depth=3, mixed=False)
    with torch.no_grad():
        next(getattr(model.routers[1], router).parameters()).fill_(torch.nan)
    with pytest.raises(ScheduleError, match=rf"dynamic_blocks.1.routers.{router} are NaN; expected numbers"):
        recorded(model, sampler_of(model))


def test_nothing_to_record() -> None:
    with pytest.raises(ConfigError, match="0 calibration samples; expected at least 1"):
        Start.draw(small_dydit(), 0, seed=0)
    text = small_dydit(conditioning="adaln_single")
    texts = small_inputs(text.shape, batch=2)[1]
    for none in (None, texts[:0]):
        with pytest.raises(ConfigError, match="takes text, without any; expected texts .* --texts"):
            Start.draw(text, 2, 0, none)
    with pytest.raises(ShapeError, match=r"text of shape \(2, .*; expected \(2, tokens, "):
        Start.draw(text, 2, 0, texts[..., 1:])
    with pytest.raises(ConfigError, match="texts for a model that takes class labels; expected none"):
        Start.draw(small_dydit(), 2, 0, texts)
    without = small_dydit(config=DyDiTConfig(token_routing=False))
    kept = recorded(without, sampler_of(without)).kept_tokens(Thresholds(0.5, 0.5))
    assert (kept == without.shape.tokens).all()
