"""Time of calls, measured interleaved in one process and compared as paired ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: object) -> Spread:
        """Median, 25 % and 75 % quantile."""
        low, median, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high))

    @classmethod
    def mean(cls, spreads: Sequence[Spread]) -> Spread:
        """Mean of the medians, and of the quartiles."""
        median, low, high = np.mean([(s.median, s.low, s.high) for s in spreads], axis=0).tolist()
        return cls(median, low, high)

    def inverse(self) -> Spread:
        """Of 1/x, of a sample of positive x."""
        return Spread(1 / self.median, 1 / self.high, 1 / self.low)

    def over(self, divisor: float) -> Spread:
        """Of x/divisor, which is positive."""
        return Spread(self.median / divisor, self.low / divisor, self.high / divisor)


def measure_interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int = 20, warmup: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of each call per round, the calls taking turns in changing order.

    Round k of every call ran within the same moment, so ratios of the same round cancel what the machine
    does meanwhile. An accelerator is synchronised before each reading of the clock.
    """
    names = list(calls)
    for _ in range(warmup):
        for name in names:
            calls[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(rounds):
        for name in names if round_index % 2 == 0 else reversed(names):
            synchronize()
            start = time.perf_counter()
            calls[name]()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def paired_speedup(baseline_ms: list[float], other_ms: list[float]) -> Spread:
    """Spread of baseline/other over the rounds: above 1, ``other`` is faster."""
    return Spread.of(np.asarray(baseline_ms) / np.asarray(other_ms))


def synchronize() -> None:
    """Wait for the accelerator, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
