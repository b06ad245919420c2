from __future__ import annotations

import numpy as np
import pytest

from dydit.report import charts
from dydit.report.summary import CurvePoint, Summary, TimeResult

STEPS = np.array([900.0, 450.0, 0.0])


def test_width_chart_tells_counts_where_pointed_at() -> None:
    heads, groups = np.zeros((3, 2, 4), bool), np.ones((3, 2, 6), bool)
    heads[1, 0, :3] = True
    head_map, group_map, head_mean, group_mean = charts.width_chart(STEPS, heads, groups).data
    np.testing.assert_allclose(head_map.z, [[0.0, 0.75, 0.0], [0.0, 0.0, 0.0]])
    assert head_map.text[0][1] == 3
    assert "of 4 heads" in head_map.hovertemplate and "of 6 groups" in group_map.hovertemplate
    assert list(head_map.customdata[0]) == ["900", "450", "0"]
    np.testing.assert_allclose(head_mean.y, [0, 0.375, 0])
    np.testing.assert_allclose(group_mean.y, 1)


def test_tokens_chart_has_blocks_upwards_and_steps_rightwards() -> None:
    kept = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    shown, mean = charts.tokens_chart(STEPS, kept).data
    np.testing.assert_allclose(shown.z, kept.T)
    assert list(shown.y) == [1, 2]
    np.testing.assert_allclose(mean.y, [0.15, 0.35, 0.55])


def test_macs_chart_has_the_mean_the_backbone_and_the_target() -> None:
    figure = charts.macs_chart(STEPS, [1e9, 2e9, 3e9], static_macs=4e9, target_ratio=0.5)
    levels = {trace.name: trace.y[0] for trace in figure.data[1:]}
    expected = {"DyDiT, mean": 2.0, "static backbone": 4.0, "target, λ = 0.5": 2.0}
    assert levels == pytest.approx(expected)
    assert len(charts.macs_chart(STEPS, [1e9, 2e9, 3e9], None, 0.5).data) == 2


def test_training_chart_joins_the_steps_that_were_logged() -> None:
    points = [CurvePoint(step=1, loss=1.0, ratio_eval=0.9), CurvePoint(step=2, loss=0.5), CurvePoint(step=3)]
    traces = {trace.name: trace for trace in charts.training_chart(points).data}
    assert list(traces["loss"].x) == [1, 2]
    assert list(traces["as exported"].x) == [1]
    assert not traces["target"].x


def test_bars_put_time_beside_compute(summary: Summary) -> None:
    backbone, compute, time = charts.bars_chart(summary.compute, summary.time).data
    assert backbone.x[0] == 1.0
    assert compute.x[0] == pytest.approx(summary.compute.ratio)
    assert time.x[0] == pytest.approx(1 / (summary.time.speedup or 0))
    assert time.error_x.array[0] > 0 and time.error_x.arrayminus[0] > 0
    assert charts.bars_chart(summary.compute, TimeResult()).data[2].x[0] is None
