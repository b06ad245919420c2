"""What a run says about itself: sums on the device, one JSON line and one progress line every few steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit.errors import OutputError
from dydit.files import write_file

METRICS_FILE = "metrics.jsonl"


class Window:
    """Sums of scalar tensors since the last log; they stay on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count detached scalars in."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self, accelerator: Any) -> dict[str, float]:
        """Mean of each value over the window and over all processes. Waits for the device."""
        names = sorted(self._sums)
        if not names:
            return {}
        means = torch.stack([self._sums[name] / self._counts[name] for name in names])
        return dict(zip(names, accelerator.reduce(means, "mean").tolist(), strict=True))

    def clear(self) -> None:
        """Start the next window."""
        self._sums.clear()
        self._counts.clear()

    def state(self) -> dict[str, list[float]]:
        """Name -> [sum, count] of this process, exact in JSON."""
        return {name: [total.item(), self._counts[name]] for name, total in self._sums.items()}

    def load(self, state: Mapping[str, list[float]], device: torch.device) -> None:
        """Take up what ``state`` gave."""
        self._sums = {name: torch.tensor(total, device=device) for name, (total, _) in state.items()}
        self._counts = {name: int(count) for name, (_, count) in state.items()}


class MetricsFile:
    """``metrics.jsonl``: one JSON object per log, appended; nothing is written where ``enabled`` is False.

    Raises:
        OutputError: from every method, when the file cannot be written.
    """

    def __init__(self, folder: Path, enabled: bool = True) -> None:
        self.path = folder / METRICS_FILE
        self.enabled = enabled

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line; a value that is not finite becomes null, since JSON has no word for it."""
        if not self.enabled:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
        except OSError as problem:
            reason = problem.strerror or problem
            raise OutputError(f"cannot write {self.path}: {reason}", remedy="free space") from problem

    def truncate(self, step: int) -> None:
        """Drop the lines after ``step``, and a line that a kill cut short."""
        if not self.enabled or not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_file(self.path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def one_line(record: Mapping[str, Any]) -> str:
    """A log record for people: the numbers that matter, in a few words."""
    shown = {
        "loss": "loss {:.4f}", "ratio": "compute {:.3f}", "ratio_target": "target {:.3f}",
        "ratio_eval": "evaluated {:.3f}", "lr": "lr {:.2e}", "images_per_s": "{:.0f} images/s",
    }  # fmt: skip
    parts = [text.format(record[name]) for name, text in shown.items() if record.get(name) is not None]
    if record.get("eta_s"):
        parts.append(f"{duration(record['eta_s'])} left")
    return f"step {record['step']}: " + ", ".join(parts)


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min`` or ``2 d 4 h``."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
