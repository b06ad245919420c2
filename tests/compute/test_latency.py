from __future__ import annotations

import itertools

import pytest

from dydit.compute import latency
from dydit.compute.latency import Spread, measure_interleaved, paired_speedup
from dydit.compute.machine import processor_name


def test_calls_take_turns_in_changing_order() -> None:
    order: list[str] = []
    times = measure_interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1
    )
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(readings) for name, readings in times.items()} == {"a": 3, "b": 3}


def test_times_are_milliseconds_of_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.accumulate(itertools.cycle([1.0, 0.25]))  # a second between calls, 0.25 s in each
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    times = measure_interleaved({"a": lambda: None, "b": lambda: None}, rounds=2, warmup=0)
    assert times == {"a": [250.0, 250.0], "b": [250.0, 250.0]}


def test_a_speedup_is_the_median_of_paired_ratios() -> None:
    # The machine slows down threefold in the last rounds: the pairs do not notice.
    spread = paired_speedup([10, 20, 30, 60, 90], [5, 10, 10, 20, 30])
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 3.0)


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of(range(5)) == Spread(median=2.0, low=1.0, high=3.0)


def test_the_processor_has_a_name() -> None:
    assert processor_name("cpu") == processor_name() != ""
