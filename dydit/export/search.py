"""Search for the thresholds at which recorded logits give a wanted compute ratio."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dydit.export.recording import Recording
from dydit.export.thresholds import LARGEST_CUT, Thresholds, clamped
from dydit.routing.gates import logit

MARGIN = 0.01  # logits between a cut and the nearest score, so that rounding in another batch decides nothing
BISECTIONS = 45


def find_thresholds(recording: Recording, start: Thresholds, target: float, precision: float) -> Thresholds:
    """Thresholds whose ratio on recorded logits is the nearest to ``target``.

    Both move by one shift of logits, as far as it takes. Masks of width are switched for whole timesteps and
    may jump across the target; so the widths on either side of the jump are tried with a threshold of
    tokens of their own.

    Args:
        start: where the shift begins.
        precision: relative; within it the smaller shift of the token threshold is preferred.
    """

    def shifted(by: float) -> Thresholds:
        return start.shifted(by, recording.routing)

    sides = _crossing(lambda by: recording.ratio(shifted(by)), -2 * LARGEST_CUT, 2 * LARGEST_CUT, target)
    found = {_settled(recording, shifted(by), target, precision): by for by in sides}

    def preference(thresholds: Thresholds) -> tuple[float, float]:
        error = abs(recording.ratio(thresholds) / target - 1)
        moved = abs(logit(thresholds.tokens) - logit(start.tokens) - found[thresholds])
        return (0.0 if error <= precision else error), moved

    return min(found, key=preference)


def find_token_threshold(
    recording: Recording, at: Thresholds, target: float, precision: float = 0.0
) -> Thresholds:
    """The same widths, and the token threshold whose ratio is the nearest to ``target``.

    Within ``precision`` of it, relative, ``at`` stays as it is.
    """
    if not recording.routing.token_routing or abs(recording.ratio(at) / target - 1) <= precision:
        return at
    candidates = [
        Thresholds(at.width, Thresholds.at(0.0, _clear_of(recording.tokens, _stored(cut))).tokens)
        for cut in _crossing(
            lambda cut: recording.ratio(Thresholds(at.width, Thresholds.at(0.0, cut).tokens)),
            -LARGEST_CUT,
            LARGEST_CUT,
            target,
        )
    ]
    return min(candidates, key=lambda thresholds: abs(recording.ratio(thresholds) - target))


def reachable_ratios(recording: Recording) -> tuple[float, float]:
    """The lowest and the highest ratio that thresholds give on recorded logits."""
    closed, opened = (Thresholds.at(cut, cut) for cut in (LARGEST_CUT, -LARGEST_CUT))
    return recording.ratio(closed), recording.ratio(opened)


def _settled(recording: Recording, at: Thresholds, target: float, precision: float) -> Thresholds:
    """``at`` clear of every score, and its token threshold fitted to its widths."""
    width, tokens = at.width, at.tokens
    if recording.routing.head_routing or recording.routing.mlp_routing:
        scores = torch.cat([recording.heads.flatten(), recording.groups.flatten()])
        width = Thresholds.at(_clear_of(scores, logit(width)), 0.0).width
    if recording.routing.token_routing:
        tokens = Thresholds.at(0.0, _clear_of(recording.tokens, logit(tokens))).tokens
    return find_token_threshold(recording, Thresholds(width, tokens), target, precision)


def _crossing(
    ratio_at: Callable[[float], float], low: float, high: float, target: float
) -> tuple[float, float]:
    """The last number from ``low`` with a ratio of the target or above, and the first with one below; the
    ratio never rises. Both are one end where the target lies beyond."""
    if ratio_at(low) < target:
        return low, low
    if ratio_at(high) >= target:
        return high, high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio_at(middle) >= target else (low, middle)
    return low, high


def _clear_of(logits: Tensor, cut: float) -> float:
    """``cut`` moved to ``MARGIN`` from the logits around it, or between them where they are closer."""
    finite = logits[logits.isfinite()]
    opened = finite > cut  # in the dtype of the scores, as the gates compare them
    below, above = finite[~opened], finite[opened]
    lowest = below.max().item() if len(below) else -math.inf
    highest = above.min().item() if len(above) else math.inf
    margin = min(MARGIN, (highest - lowest) / 2)
    return clamped(min(max(cut, lowest + margin), highest - margin))


def _stored(cut: float) -> float:
    """A cut as it comes back from the threshold that holds it."""
    return logit(Thresholds.at(0.0, cut).tokens)
