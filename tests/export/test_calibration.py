"""Calibration meets the target on what the engine executes, and on failure leaves the model as it was."""

from __future__ import annotations

import json
from typing import Any, cast

import numpy as np
import pytest
import torch
from calibration_builders import routed_dydit, sampler_of
from core_builders import small_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.compute.engine import count_engine
from dydit.config import DyDiTConfig
from dydit.costs import static_macs
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ConfigError, ScheduleError
from dydit.export import calibration
from dydit.export.calibration import calibrate, secant
from dydit.export.recording import Start, record
from dydit.export.schedule import SubnetSchedule
from dydit.export.thresholds import Thresholds
from dydit.runtime.engine import SubnetEngine


def thresholds_of(model: DyDiT) -> tuple[float, float]:
    return model.routing_config.threshold, model.routing_config.token_threshold


@pytest.mark.parametrize(
    ("conditioning", "name", "guidance_scale"),
    [
        ("adaln_zero", "ddim", 1.0),
        ("in_context", "ddim", 1.5),
        ("adaln_zero", "ddpm", 1.5),
        ("cross_attention", "dpm++", 1.0),
        ("adaln", "flow_heun", 1.5),
    ],
)
def test_the_target_is_met(conditioning: str, name: str, guidance_scale: float) -> None:
    model = routed_dydit(conditioning=conditioning)
    sampler = sampler_of(model, name, guidance_scale)
    start = Start.draw(model, 8, seed=3)
    before, ratio = Thresholds.of(model), record(model, sampler, start).ratio(Thresholds.of(model))
    for target in (0.45, 0.6):
        found = calibrate(model, sampler, target, samples=8, seed=3)
        assert found.ratio_after == pytest.approx(target, rel=0.01)
        assert thresholds_of(model) == (found.after.width, found.after.tokens)
        assert record(model, sampler, start).ratio(found.after) == found.ratio_after
        assert (found.before, found.ratio_before) == (before, ratio)
        before, ratio = found.after, found.ratio_after


def test_a_model_that_takes_text() -> None:
    """Guided: half of each batch has the null text."""
    model = routed_dydit(conditioning="adaln_single")
    sampler, texts = sampler_of(model), small_inputs(model.shape, batch=3)[1]
    found = calibrate(model, sampler, 0.55, samples=4, texts=texts, capacity_multiple=1)
    assert found.ratio_after == pytest.approx(0.55, rel=0.01) != found.ratio_before
    start = Start.draw(model, 4, 0, texts)
    assert torch.equal(start.labels, texts[[0, 1, 2, 0]])
    assert record(model, sampler, start).ratio(found.after) == found.ratio_after
    other = Start.draw(model, 4, 0, small_inputs(model.shape, batch=3, seed=1)[1])
    assert record(model, sampler, other).ratio(found.after) != found.ratio_after


def test_the_engine_of_the_calibrated_model_executes_the_target() -> None:
    """Counted by fvcore, on the trajectories of the engine itself."""
    model = routed_dydit()
    sampler = sampler_of(model)
    found = calibrate(model, sampler, 0.5, samples=4)
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, sampler.timesteps))
    shares = []

    def counted(x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
        shares.append(count_engine(engine, x, t, y).counted.total / len(x) / static_macs(model.shape))
        return engine(x, t, y)

    Start.draw(model, 4, seed=0).walk(sampler, counted, model.null_label)
    # Rounding may decide a token otherwise in the engine; the target is a mean over thousands.
    assert np.mean(shares) == pytest.approx(found.ratio_after, rel=1e-3)
    assert np.mean(shares) == pytest.approx(0.5, rel=0.01)
    assert np.array(shares) * static_macs(model.shape) == pytest.approx(found.macs, rel=5e-3)
    assert found.to_json()["macs_per_timestep"] == [round(macs) for macs in found.macs]


@settings(max_examples=15)
@given(seed=st.integers(0, 200), share=st.floats(0.2, 0.8), guided=st.booleans())
def test_any_model_and_target(seed: int, share: float, guided: bool) -> None:
    model = routed_dydit(seed, depth=2)
    target = 0.35 + 0.4 * share
    found = calibrate(model, sampler_of(model, guidance_scale=1.5 if guided else 1.0), target)
    assert found.ratio_after == pytest.approx(target, rel=0.01)
    assert 1 <= found.passes <= calibration.PASSES


@pytest.mark.parametrize("tolerance", [1e-3, 0.05])
def test_tolerance(tolerance: float) -> None:
    model = routed_dydit()
    found = calibrate(model, sampler_of(model), 0.55, tolerance=tolerance)
    assert found.ratio_after == pytest.approx(0.55, rel=tolerance)


def test_a_target_that_is_met_changes_nothing() -> None:
    model = routed_dydit()
    first = calibrate(model, sampler_of(model), None)
    assert (first.passes, first.before, first.after) == (1, Thresholds(0.5, 0.5), Thresholds(0.5, 0.5))
    again = calibrate(model, sampler_of(model), first.ratio_after * 1.009)
    assert again.passes == 1 and again.after == first.after and thresholds_of(model) == (0.5, 0.5)


def test_equal_calls_find_equal_thresholds() -> None:
    results = []
    for _ in range(2):
        model = routed_dydit().train()
        state = torch.get_rng_state()
        results.append(calibrate(model, sampler_of(model, "ddpm"), 0.5, seed=7).to_json())
        assert model.training and torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1]


def test_where_width_has_no_steps_the_tokens_are_tuned() -> None:
    """A converted model that learned nothing of width: one score for everything, at every timestep."""
    model = routed_dydit()
    for routers in model.routers:
        for router in (routers.head_router, routers.group_router):
            torch.nn.init.zeros_(router.router.weight)
            torch.nn.init.constant_(router.router.bias, 1.0)
    found = calibrate(model, sampler_of(model), 0.7)
    assert found.ratio_after == pytest.approx(0.7, rel=0.01)
    heads, groups = model.width_gates(torch.zeros(1, 64))
    assert heads.all() and groups.all() and found.after.tokens != 0.5


def test_without_width_routers_only_the_tokens_move() -> None:
    config = DyDiTConfig(head_routing=False, mlp_routing=False, token_router_ratio=4)
    model = routed_dydit(config=config)
    found = calibrate(model, sampler_of(model), 0.75)
    assert found.ratio_after == pytest.approx(0.75, rel=0.01)
    assert found.after.width == 0.5 and found.after.tokens != 0.5


def test_without_token_routers_only_the_width_moves() -> None:
    model = routed_dydit(config=DyDiTConfig(token_routing=False, mlp_groups=32))
    found = calibrate(model, sampler_of(model), 0.75)
    assert found.ratio_after == pytest.approx(0.75, rel=0.01)
    assert found.after.tokens == 0.5 and found.after.width != 0.5
    assert found.passes == 2  # widths do not depend on the trajectory


@pytest.mark.parametrize("target", [0.01, 1.5])
def test_a_target_out_of_reach(target: float) -> None:
    model = routed_dydit()
    told = rf"compute ratio of {target:g}: the nearest is [\d.]+; expected one that they reach, 0\.\d+ to"
    with pytest.raises(ConfigError, match=told + r" [\d.]+ in steps; give another target, or fine-tune"):
        calibrate(model, sampler_of(model), target)
    assert thresholds_of(model) == (0.5, 0.5)


def test_a_target_between_two_steps() -> None:
    model = routed_dydit(config=DyDiTConfig(token_routing=False))
    for routers in model.routers:
        for router in (routers.head_router, routers.group_router):
            torch.nn.init.zeros_(router.router.weight)
            torch.nn.init.constant_(router.router.bias, 1.0)
    low, high = (calibrate(model, sampler_of(model), None).ratio_after for _ in range(2))
    with pytest.raises(ConfigError, match="no thresholds found for a compute ratio of 0.8: the nearest is"):
        calibrate(model, sampler_of(model), 0.8)
    assert low == high > 0.99 and thresholds_of(model) == (0.5, 0.5)


def test_a_search_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "PASSES", 1)
    model = routed_dydit()
    told = r"the nearest of 1 passes is 0\.\d+.*in steps; give another target, or more samples"
    with pytest.raises(ConfigError, match=told):
        calibrate(model, sampler_of(model), 0.5)
    assert thresholds_of(model) == (0.5, 0.5)


def test_later_passes_hold_the_widths_and_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the logits mislead, how the measured ratio answered the token threshold still leads there."""
    monkeypatch.setattr(calibration, "FREE_PASSES", 0)
    model = routed_dydit()
    found = calibrate(model, sampler_of(model), 0.6, tolerance=2e-3)
    assert found.ratio_after == pytest.approx(0.6, rel=2e-3) and found.passes > 2
    assert found.after.width == 0.5


@pytest.mark.parametrize("failure", ["nan", "interrupt"])
def test_thresholds_come_back_whatever_fails(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed_dydit()
    calls = 0
    original = calibration.record

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and failure == "interrupt":
            raise KeyboardInterrupt
        if calls == 2:
            torch.nn.init.constant_(model.routers[2].token_router[2].bias, torch.nan)
        return original(*args)

    monkeypatch.setattr(calibration, "record", failing)
    with pytest.raises(KeyboardInterrupt if failure == "interrupt" else ScheduleError) as raised:
        calibrate(model, sampler_of(model), 0.5)
    assert calls == 2 and thresholds_of(model) == (0.5, 0.5)
    assert failure == "interrupt" or "dynamic_blocks.2.routers.token_router are NaN" in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target": 0.0}, "target ratio 0; expected above 0"),
        ({"target": float("nan")}, "target ratio nan"),
        ({"target": 0.5, "tolerance": 0.0}, "tolerance 0; expected above 0"),
        ({"target": 0.5, "samples": 0}, "0 calibration samples"),
        ({"target": 0.5, "capacity_multiple": 0}, "multiples of 0; expected 1 to the model's 16"),
        ({"target": 0.5, "capacity_multiple": 17}, "multiples of 17"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], told: str) -> None:
    model, no_sampler = routed_dydit(), cast(Any, None)  # refused before anything is sampled
    with pytest.raises(ConfigError, match=told):
        calibrate(model, no_sampler, **settings)
    assert thresholds_of(model) == (0.5, 0.5)


def test_what_the_manifest_keeps() -> None:
    model = routed_dydit()
    found = calibrate(model, sampler_of(model), 0.5, samples=3, seed=9, capacity_multiple=4)
    kept = found.to_json()
    assert json.loads(json.dumps(kept)) == kept
    assert (kept["target"], kept["samples"], kept["seed"], kept["passes"]) == (0.5, 3, 9, found.passes)
    assert kept["thresholds"]["before"] == {"width": 0.5, "tokens": 0.5}
    assert kept["thresholds"]["after"] == {"width": found.after.width, "tokens": found.after.tokens}
    assert kept["ratio"] == {"before": found.ratio_before, "after": found.ratio_after}
    assert kept["capacity"]["multiple"] == 4 and 0 < kept["capacity"]["ratio"] < 1
    assert set(kept["capacity"]["relative_l2_difference"]) == {"calls", "samples"}
    assert "capacity" not in calibrate(model, sampler_of(model), None).to_json()


def test_secant() -> None:
    assert secant([], 0.5) is None and secant([(0.0, 0.7)], 0.5) is None
    assert secant([(0.0, 0.7), (1.0, 0.6)], 0.5) == pytest.approx(2.0)
    assert secant([(0.0, 0.7), (1.0, 0.7)], 0.5) is None  # flat
    assert secant([(0.0, 0.6), (1.0, 0.7)], 0.5) is None  # rises
    # Beyond the bracket of what was measured: its middle.
    assert secant([(3.0, 0.45), (0.0, 0.7), (0.5, 0.69)], 0.5) == pytest.approx(1.75)
