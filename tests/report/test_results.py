from __future__ import annotations

import pytest

from dydit.evaluation.quality import Metric
from dydit.report.results import (
    DASH,
    measured,
    metric_text,
    number,
    percent,
    result_rows,
    timestep_text,
    verdict,
)
from dydit.report.summary import ComputeResult, Summary, TimeResult

from . import synthetic


def run(compute: ComputeResult, time: TimeResult) -> Summary:
    return Summary(conditions=synthetic.conditions(), compute=compute, time=time)


def timed(*speedups: float) -> TimeResult:
    return TimeResult(static_ms=tuple(10.0 * s for s in speedups), engine_ms=(10.0,) * len(speedups))


HALF = ComputeResult(static_macs=4e9, engine_macs=(1e9, 3e9), unsupported={})


def test_numbers_are_short_and_none_is_a_dash() -> None:
    assert [number(v) for v in (None, 0.5, 118.694, 12345.6)] == [DASH, "0.5", "118.7", "12,346"]
    assert [measured(v) for v in (None, 0.0107, 13.8, 12345.6)] == [DASH, "0.01070", "13.80", "12,346"]
    assert [percent(v) for v in (None, 0.5)] == [DASH, "50.0 %"]
    assert [timestep_text(t) for t in (999.0, 0.0, 37.5)] == ["999", "0", "37.5"]
    assert metric_text(Metric("m", 97.0, "higher", "%")) == "97.0 %"
    assert metric_text(Metric("m", None, "higher", "%")) == DASH
    assert metric_text(Metric("m", 2.5, "lower")) == "2.500"


def test_gflops_are_twice_gmacs_and_both_are_named() -> None:
    gmacs, gflops, *_ = result_rows(run(HALF, TimeResult()))
    assert gmacs.quantity.startswith("GMACs") and gflops.quantity.startswith("GFLOPs")
    assert (gmacs.backbone, gmacs.dydit) == ("4.000", "2.000")
    assert (gflops.backbone, gflops.dydit) == ("8.000", "4.000")


def test_every_row_carries_its_conditions(summary: Summary) -> None:
    rows = {row.quantity: row for row in result_rows(summary)}
    assert all(row.conditions for row in rows.values())
    time = rows["time, ms per step (batch of 64)"].conditions
    for word in ("20 rounds", "2 threads", "a synthetic processor", "float32", "torch 2.15.0"):
        assert word in time
    assert "λ = 0.5" in rows["GMACs per image and step"].conditions


def test_what_was_not_measured_is_a_dash(bare_summary: Summary) -> None:
    rows = result_rows(bare_summary)
    assert {row.dydit for row in rows} == {DASH}
    assert rows[0].conditions == "not counted"
    assert rows[2].conditions == "not measured"
    assert verdict(bare_summary) == ("Compute was not counted.", "Time was not measured.")


@pytest.mark.parametrize(
    ("time", "claim"),
    [
        (timed(1.5, 1.6, 1.7), "it was 1.60× as fast as the backbone; 2.00× would be ideal: 80.0 %"),
        (timed(0.9, 1.02, 1.1), "shows no clear speed-up: 0.96–1.06×"),
        (timed(0.8, 0.85, 0.9), "slower than the backbone, at 0.85×"),
    ],
)
def test_the_verdict_claims_no_more_than_was_measured(time: TimeResult, claim: str) -> None:
    assert claim in verdict(run(HALF, time))[1]


def test_an_uncounted_operator_makes_the_macs_a_lower_bound() -> None:
    partly = HALF.model_copy(update={"unsupported": {"aten::mystery": 3}})
    shown = run(partly, TimeResult())
    assert "at least 50.0 %" in verdict(shown)[0]
    assert "lower bound, not counted: aten::mystery ×3" in result_rows(shown)[0].conditions
