"""Calibration: the thresholds at which the deployed model costs what it was trained to cost.

Training draws noisy gates, deployment compares scores with a threshold: a head that is on in three of four
training steps is always on when deployed. So the deployed compute differs from the target of the compute
loss. It is measured here on trajectories of the sampler, and put right by moving the thresholds.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dydit.diffusion import Sampler
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ConfigError
from dydit.export.capacity import Capacities, check_multiple, measure_capacities
from dydit.export.recording import Recording, Start, evaluating, record
from dydit.export.search import find_thresholds, find_token_threshold, reachable_ratios
from dydit.export.thresholds import Thresholds
from dydit.routing.gates import logit

PASSES = 12  # trajectories at most; two to four are usual
FREE_PASSES = 3  # those after which the widths stay and only the tokens are corrected


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a search for thresholds, or a measurement at those of the model, came to.

    Ratios are deployed MACs, token routers included, over the static backbone's: means over the model calls
    of the calibration set's trajectories.

    Attributes:
        before, after: thresholds.
        ratio_before, ratio_after: measured at them.
        target: of the search; None: the thresholds were left as they were.
        samples, seed: of the calibration set.
        passes: trajectories that were run to find the thresholds.
        macs: deployed MACs per sample at each timestep (S,) in exact mode, at ``after``.
        chosen: capacities, where they were asked for.
    """

    before: Thresholds
    after: Thresholds
    ratio_before: float
    ratio_after: float
    target: float | None
    samples: int
    seed: int
    passes: int
    macs: np.ndarray
    chosen: Capacities | None = None

    @property
    def capacities(self) -> np.ndarray | None:
        """Tokens per sample in capacity mode, int32 (S, L)."""
        return None if self.chosen is None else self.chosen.tokens

    def to_json(self) -> dict[str, Any]:
        """For the manifest: all but the capacities themselves, which are a tensor of the schedule."""
        found: dict[str, Any] = {
            "target": self.target,
            "samples": self.samples,
            "seed": self.seed,
            "passes": self.passes,
            "thresholds": {"before": asdict(self.before), "after": asdict(self.after)},
            "ratio": {"before": self.ratio_before, "after": self.ratio_after},
            "macs_per_timestep": [round(macs) for macs in self.macs.tolist()],
        }
        if self.chosen is not None:
            found["capacity"] = {
                "multiple": self.chosen.multiple,
                "ratio": self.chosen.ratio,
                "relative_l2_difference": {
                    "calls": self.chosen.call_difference,
                    "samples": self.chosen.sample_difference,
                },
            }
        return found


def calibrate(
    model: DyDiT,
    sampler: Sampler,
    target: float | None,
    samples: int = 8,
    seed: int = 0,
    tolerance: float = 0.01,
    capacity_multiple: int | None = None,
    progress: bool = False,
    texts: Tensor | None = None,
) -> Calibration:
    """Set the model's thresholds so that sampling costs ``target`` of the static backbone.

    The calibration set is ``samples`` trajectories of the masked model from seeded noise and labels, guided
    as the sampler is; with guidance half of each batch has the null label. Every pass costs one trajectory:
    the thresholds found on its logits change the tokens of the next.

    Args:
        model: changed in place, its thresholds alone; on failure not at all.
        sampler: whose timesteps the schedule will hold.
        target: compute ratio; None leaves the thresholds as they are and measures.
        tolerance: relative, of the ratio.
        capacity_multiple: also choose capacities, in multiples of this; None: no capacities.
        progress: show a bar for every pass that takes more than a second.
        texts: (m, M, context_dim) in the place of labels, for a model that takes text; samples take one
            after another, round and round.

    Raises:
        ConfigError: a setting is out of range, no thresholds reach the target, or texts are missing.
        ShapeError: texts of another width than the model's.
        ScheduleError: a router gives NaN; names it and its block.
    """
    _check_settings(target, tolerance)
    if capacity_multiple is not None:
        check_multiple(capacity_multiple, model.shape.tokens)
    before, start = Thresholds.of(model), Start.draw(model, samples, seed, texts)
    search = _Search(model, sampler, start, progress)
    try:
        first = recording = search.measure()
        if target is not None:
            recording = search.reach(target, tolerance)
        after = Thresholds.of(model)
        chosen = None
        if capacity_multiple is not None:
            with evaluating(model):
                chosen = measure_capacities(model, sampler, start, recording, capacity_multiple, progress)
    except BaseException:
        before.apply(model)
        raise
    ratios, macs = (first.ratio(before), recording.ratio(after)), recording.macs_per_timestep(after)
    return Calibration(before, after, *ratios, target, samples, seed, len(search.measured), macs, chosen)


class _Search:
    """Measures trajectories at the model's thresholds and moves these.

    Attributes:
        measured: thresholds and ratio of every pass.
    """

    def __init__(self, model: DyDiT, sampler: Sampler, start: Start, progress: bool) -> None:
        self.model, self.sampler, self.start, self.progress = model, sampler, start, progress
        self.measured: list[tuple[Thresholds, float]] = []

    def measure(self) -> Recording:
        """One pass."""
        title = f"calibration, pass {len(self.measured) + 1}"
        self.recording = record(self.model, self.sampler, self.start, title, self.progress)
        thresholds = Thresholds.of(self.model)
        self.measured.append((thresholds, self.recording.ratio(thresholds)))
        return self.recording

    def reach(self, target: float, tolerance: float) -> Recording:
        """Passes until the measured ratio is within ``tolerance``, relative, of ``target``.

        Raises:
            ConfigError: it cannot be reached.
        """
        while abs(self.measured[-1][1] / target - 1) > tolerance:
            if len(self.measured) == PASSES:
                nearest = min((ratio for _, ratio in self.measured), key=lambda ratio: abs(ratio - target))
                raise self._missed(target, f"the nearest of {PASSES} passes is {nearest:.4f}", "more samples")
            self._next(target, tolerance).apply(self.model)
            self.measure()
        return self.recording

    def _next(self, target: float, tolerance: float) -> Thresholds:
        """From the latest logits; later from how the ratio answered the token threshold, at fixed widths."""
        last = self.measured[-1][0]
        if len(self.measured) > FREE_PASSES and self.recording.routing.token_routing:
            same = [(logit(at.tokens), ratio) for at, ratio in self.measured if at.width == last.width]
            if (cut := secant(same, target)) is not None:
                return Thresholds(last.width, Thresholds.at(0.0, cut).tokens)
            held = find_token_threshold(self.recording, last, target)
            if self._error(held, target) <= tolerance:
                return held
        found = find_thresholds(self.recording, last, target, tolerance / 4)
        if self._error(found, target) > tolerance:
            nearest = self.recording.ratio(found)
            raise self._missed(target, f"the nearest is {nearest:.4f}", "fine-tune the model for this one")
        return found

    def _error(self, thresholds: Thresholds, target: float) -> float:
        """Relative, on the latest logits."""
        return abs(self.recording.ratio(thresholds) / target - 1)

    def _missed(self, target: float, nearest: str, remedy: str) -> ConfigError:
        low, high = reachable_ratios(self.recording)
        return ConfigError(
            f"no thresholds found for a compute ratio of {target:g}: {nearest}",
            expected=f"one that they reach, {low:.4f} to {high:.4f} in steps",
            remedy=f"give another target, or {remedy}",
        )


def secant(measured: list[tuple[float, float]], target: float) -> float | None:
    """The cut where the line through the last two (cut, ratio) meets ``target``; None if that does not fall.

    Once cuts on either side of the target were measured it stays between the nearest two, at worst in the
    middle: passes then halve what is left, whatever the trajectories do.
    """
    low = max((x for x, y in measured if y >= target), default=math.inf)
    high = min((x for x, y in measured if y < target), default=-math.inf)
    cut = None
    if len(measured) > 1:
        (x0, y0), (x1, y1) = measured[-2:]
        if (y1 - y0) * (x1 - x0) < 0:
            cut = x1 + (target - y1) * (x1 - x0) / (y1 - y0)
    if low < high and (cut is None or not low < cut < high):
        return (low + high) / 2
    return cut


def _check_settings(target: float | None, tolerance: float) -> None:
    if target is not None and not 0 < target < float("inf"):
        raise ConfigError(f"target ratio {target:g}", expected="above 0")
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance {tolerance:g}", expected="above 0 and below 1")
