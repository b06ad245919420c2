"""Settings that change during a run."""

from __future__ import annotations

import pytest

from dydit.config import GatesConfig
from dydit.training.schedules import decisiveness_weight, gate_temperature


@pytest.mark.parametrize(("step", "expected"), [(0, 5.0), (10, 5.0), (15, 5.0**0.5), (20, 1.0), (99, 1.0)])
def test_the_temperature_falls_geometrically(step: int, expected: float) -> None:
    gates = GatesConfig(final_temperature=1.0, anneal_start=10, anneal_steps=10)
    assert gate_temperature(gates, 5.0, step) == pytest.approx(expected)


def test_without_a_final_temperature_it_stays() -> None:
    assert gate_temperature(GatesConfig(anneal_steps=10), 5.0, 1000) == 5.0


def test_decisiveness_starts_when_told_and_rises() -> None:
    gates = GatesConfig(decisiveness=2.0, decisiveness_start=3, decisiveness_ramp=4)
    assert [decisiveness_weight(gates, step) for step in range(9)] == [0, 0, 0, 0.5, 1, 1.5, 2, 2, 2]
    assert decisiveness_weight(GatesConfig(decisiveness=2.0), 0) == 2.0
    assert decisiveness_weight(GatesConfig(), 100) == 0.0
