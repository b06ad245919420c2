"""Thresholds found on recorded logits are the best there are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from calibration_builders import some_recording
from core_builders import small_dydit
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dydit.config import DyDiTConfig
from dydit.export.search import find_thresholds, find_token_threshold, reachable_ratios
from dydit.export.thresholds import LARGEST_CUT, Thresholds
from dydit.routing.gates import logit


def cuts_between(logits: torch.Tensor) -> list[float]:
    """One cut for every way that a threshold can divide the logits."""
    ordered = np.unique(logits[logits.isfinite()].double().numpy())
    middle = (ordered[1:] + ordered[:-1]) / 2
    return [ordered[0] - 1, *middle.tolist(), ordered[-1] + 1]


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), target=st.floats(0.2, 1.1), width=st.sampled_from([0.3, 0.5, 0.8]))
def test_no_token_threshold_comes_nearer(seed: int, target: float, width: float) -> None:
    recording = some_recording(seed)
    found = find_token_threshold(recording, Thresholds(width, 0.5), target)
    assert found.width == width
    best = min(
        abs(recording.ratio(Thresholds(width, Thresholds.at(0.0, cut).tokens)) - target)
        for cut in cuts_between(recording.tokens)
    )
    assert abs(recording.ratio(found) - target) == pytest.approx(best, abs=1e-12)


@given(seed=st.integers(0, 1000), share=st.floats(0.02, 0.98), scale=st.sampled_from([0.5, 2.0, 6.0]))
def test_any_reachable_ratio_is_found(seed: int, share: float, scale: float) -> None:
    recording = some_recording(seed, scale)
    low, high = reachable_ratios(recording)
    target = low + share * (high - low)
    found = find_thresholds(recording, Thresholds(0.5, 0.5), target, precision=0.0025)
    assert recording.ratio(found) == pytest.approx(target, rel=0.01)


@given(seed=st.integers(0, 1000), share=st.floats(0.1, 0.9))
def test_where_widths_jump_the_tokens_make_up_for_it(seed: int, share: float) -> None:
    """Either all components are on or only those that always are: no shift meets a target in between."""
    recording = some_recording(seed, widths="equal")
    closed, opened = (recording.ratio(Thresholds.at(cut, 0.0)) for cut in (LARGEST_CUT, -LARGEST_CUT))
    target = closed + share * (opened - closed)
    low, high = (
        [recording.ratio(Thresholds.at(width, cut)) for width in (LARGEST_CUT, -LARGEST_CUT)]
        for cut in (LARGEST_CUT, -LARGEST_CUT)
    )
    assume(any(a <= target <= b for a, b in zip(low, high, strict=True)))
    found = find_thresholds(recording, Thresholds(0.5, 0.5), target, precision=0.0025)
    assert recording.ratio(found) == pytest.approx(target, rel=0.01)


@given(seed=st.integers(0, 1000), target=st.floats(0.3, 0.9))
def test_no_score_lies_at_a_cut(seed: int, target: float) -> None:
    """Another batch computes the same score with another rounding; it must not decide another width."""
    recording = some_recording(seed)
    found = find_thresholds(recording, Thresholds(0.5, 0.5), target, precision=0.0025)
    for logits, threshold in (
        (torch.cat([recording.heads.flatten(), recording.groups.flatten()]), found.width),
        (recording.tokens.flatten(), found.tokens),
    ):
        distance = (logits - logit(threshold)).abs().min().item()
        gaps = logits[logits.isfinite()].sort().values.diff()
        assert distance > min(0.005, gaps[gaps > 0].min().item() / 4)


@pytest.mark.parametrize("beyond", [1e-3, 10.0])
def test_beyond_reach_the_nearest_end_is_given(beyond: float) -> None:
    recording = some_recording(0)
    low, high = reachable_ratios(recording)
    found = find_thresholds(recording, Thresholds(0.5, 0.5), beyond, precision=0.0025)
    assert recording.ratio(found) == (low if beyond < 1 else high)


@pytest.mark.parametrize(
    "absent", [("head_routing", "mlp_routing"), ("token_routing",)], ids=["no width", "no tokens"]
)
def test_a_threshold_that_decides_nothing_stays(absent: tuple[str, ...]) -> None:
    recording = some_recording(3, **dict.fromkeys(absent, False))
    low, high = reachable_ratios(recording)
    found = find_thresholds(recording, Thresholds(0.4, 0.6), (low + high) / 2, precision=0.0025)
    assert recording.ratio(found) == pytest.approx((low + high) / 2, rel=0.05)
    assert (found.tokens == 0.6) if absent == ("token_routing",) else (found.width == 0.4)
    assert found != Thresholds(0.4, 0.6)


@given(a=st.floats(-60, 60), b=st.floats(-60, 60), seed=st.integers(0, 20))
def test_the_ratio_never_rises_with_the_cut(a: float, b: float, seed: int) -> None:
    recording = some_recording(seed)
    ratios = [recording.ratio(Thresholds.at(cut, cut)) for cut in sorted((a, b))]
    assert ratios[0] >= ratios[1]


@given(cut=st.floats(-30, 30))
def test_thresholds_and_their_logits(cut: float) -> None:
    thresholds = Thresholds.at(cut, -cut)
    assert logit(thresholds.width) == pytest.approx(cut, abs=1e-2)
    assert logit(thresholds.tokens) == pytest.approx(-cut, abs=1e-2)
    moved = thresholds.shifted(0.5, DyDiTConfig())
    assert logit(moved.width) == pytest.approx(logit(thresholds.width) + 0.5, abs=1e-2)


def test_thresholds_are_valid_however_far_the_cut() -> None:
    for cut, sign in itertools.product((40.0, 1e4, math.inf), (1, -1)):
        thresholds = Thresholds.at(sign * cut, -sign * cut)
        assert 0 < thresholds.width < 1 and 0 < thresholds.tokens < 1
        small_dydit(mixed=False).set_thresholds(thresholds.width, thresholds.tokens)
