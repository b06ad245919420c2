"""The two thresholds of a model, and the logits that they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dydit.config import DyDiTConfig
from dydit.dynamic.dydit import DyDiT
from dydit.routing.gates import logit

LARGEST_CUT = 34.0  # a threshold is a float64 below 1: further out its logit would be too coarse


@dataclass(frozen=True)
class Thresholds:
    """Scores above which heads and groups (``width``) and tokens are on; between 0 and 1."""

    width: float
    tokens: float

    @classmethod
    def of(cls, model: DyDiT) -> Thresholds:
        """A model's own."""
        return cls(model.routing_config.threshold, model.routing_config.token_threshold)

    @classmethod
    def at(cls, width_cut: float, token_cut: float) -> Thresholds:
        """Those with these logits, as far out as thresholds can be told apart."""
        return cls(*(1 / (1 + math.exp(-clamped(cut))) for cut in (width_cut, token_cut)))

    def shifted(self, by: float, routing: DyDiTConfig) -> Thresholds:
        """Both moved by the same number of logits; one that decides nothing stays."""
        moved = Thresholds.at(logit(self.width) + by, logit(self.tokens) + by)
        width = moved.width if routing.head_routing or routing.mlp_routing else self.width
        return Thresholds(width, moved.tokens if routing.token_routing else self.tokens)

    def apply(self, model: DyDiT) -> None:
        """Make them the model's."""
        model.set_thresholds(self.width, self.tokens)


def clamped(cut: float) -> float:
    """The nearest logit that a threshold can stand for."""
    return min(max(cut, -LARGEST_CUT), LARGEST_CUT)
