"""The form in which every quality metric is reported. No torch: reports read it without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One named quality figure.

    Attributes:
        name: the metric named for what it is, features included, e.g.
            ``"Fréchet distance (digit-classifier features)"``. Only Inception features may be called FID.
        value: None where it was not measured.
        better: which direction is an improvement.
        unit: printed after the value; ``"%"`` values are stored in percent. Empty for a plain number.
    """

    name: str
    value: float | None
    better: Literal["lower", "higher"]
    unit: str = ""
