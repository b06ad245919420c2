from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from dydit.errors import DataError
from dydit.evaluation.quality import Metric
from dydit.report.summary import (
    ComputeResult,
    CurvePoint,
    EquivalenceCheck,
    QualityRow,
    Summary,
    SummaryArrays,
    TimeResult,
)

from . import synthetic


def test_derived_figures_follow_from_the_measured_ones() -> None:
    run = Summary(
        conditions=synthetic.conditions(),
        compute=ComputeResult(static_macs=100.0, engine_macs=(40.0, 60.0)),
        time=TimeResult(static_ms=(10.0, 30.0, 12.0), engine_ms=(5.0, 20.0, 8.0)),  # 2, 1.5, 1.5
    )
    assert run.compute.ratio == pytest.approx(0.5)
    assert run.compute.ideal_speedup == pytest.approx(2.0)
    assert run.time.speedup == pytest.approx(1.5)  # paired: the ratio of the medians would be 12 / 8 too
    assert run.time.speedup_quartiles == pytest.approx((1.5, 1.5, 1.75))
    assert run.realised_share == pytest.approx(0.75)


def test_speedup_is_paired_round_by_round() -> None:
    slowing_down = TimeResult(static_ms=(10.0, 20.0, 40.0), engine_ms=(5.0, 10.0, 20.0))
    assert slowing_down.speedup_quartiles == pytest.approx((2.0, 2.0, 2.0))


def test_nothing_measured_gives_none_and_never_zero(bare_summary: Summary) -> None:
    compute, time = bare_summary.compute, bare_summary.time
    derived = (compute.ratio, compute.ideal_speedup, compute.engine_mean_macs, time.speedup)
    assert derived == (None,) * 4
    assert (time.static_median_ms, time.engine_median_ms, bare_summary.realised_share) == (None, None, None)
    assert EquivalenceCheck(name="a").passed is None


def test_checks_compare_with_their_tolerance() -> None:
    assert EquivalenceCheck(name="a", max_relative_difference=1e-6).passed is True
    assert EquivalenceCheck(name="a", max_relative_difference=1e-4).passed is False


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_result_that_is_not_a_number_is_refused(bad: float) -> None:
    with pytest.raises(ValidationError):
        ComputeResult(static_macs=bad)
    with pytest.raises(ValidationError, match="not measured is None"):
        QualityRow(role="dydit", label="a", metrics=(Metric("m", bad, "lower"),), conditions="")


def test_a_diverged_loss_is_left_out_of_the_curve() -> None:
    assert CurvePoint(step=3, loss=float("nan"), target=0.5) == CurvePoint(step=3, target=0.5)


@pytest.mark.parametrize(
    ("static_ms", "engine_ms", "message"),
    [((1.0, 2.0), (1.0,), "2 static rounds beside 1 engine"), ((0.0,), (1.0,), "zero or less")],
)
def test_times_that_cannot_be_are_refused(
    static_ms: tuple[float, ...], engine_ms: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        TimeResult(static_ms=static_ms, engine_ms=engine_ms)


def test_parts_of_a_summary_must_agree(summary: Summary) -> None:
    with pytest.raises(ValidationError, match="3 timesteps beside a schedule of 20"):
        Summary(
            conditions=synthetic.conditions(),
            compute=ComputeResult(engine_macs=(1.0, 2.0, 3.0)),
            arrays=summary.arrays,
        )
    odd = QualityRow(role="control", label="c", metrics=(Metric("other", 1.0, "lower"),), conditions="")
    with pytest.raises(ValidationError, match="different metrics"):
        Summary(conditions=synthetic.conditions(), quality=(*summary.quality, odd))


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    steps, heads = np.arange(3.0), np.ones((3, 2, 4), bool)
    with pytest.raises(DataError, match="without groups"):
        SummaryArrays(timesteps=steps, heads=heads)
    with pytest.raises(DataError, match=r"groups has shape \(3, 1, 4\)"):
        SummaryArrays(timesteps=steps, heads=heads, groups=np.ones((3, 1, 4), bool))
    with pytest.raises(DataError, match="without timesteps, heads"):
        SummaryArrays(tokens_kept=np.ones((3, 2)))
    with pytest.raises(DataError, match="sample_labels has shape"):
        images = np.zeros((5, 1, 8, 8))
        SummaryArrays(backbone_samples=images, dydit_samples=images, sample_labels=np.zeros(4, int))
