"""The rows of ``dydit macs``: what was counted, on what input, and how it is shown."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dydit.cli.models import open_dydit, open_model
from dydit.compute.counting import MacReport, count_macs
from dydit.dynamic.dydit import DyDiT
from dydit.export.schedule import SubnetSchedule
from dydit.models.dit import DiT
from dydit.runtime.engine import SubnetEngine

# DiT-XL/2 and whatever else is meant as a preset; a misspelt one is then told with the nearest.
_PRESET = re.compile(r"DiT-\w+/\d+")
_ANY_TIMESTEP = 500.0  # every timestep of a dense model costs the same


@dataclass(frozen=True)
class MacRow:
    """Compute of one network for one image and one forward.

    Attributes:
        name: what was counted.
        gmacs: 10⁹ multiply-adds; gflops is twice that.
        timesteps: how many timesteps it is the mean of; 1 where all cost the same.
        gmacs_range: cheapest and dearest timestep.
        unsupported: operators without a rule, with their counts; where there are some, gmacs reads low.
    """

    name: str
    gmacs: float
    timesteps: int = 1
    gmacs_range: tuple[float, float] | None = None
    unsupported: dict[str, int] = field(default_factory=dict)

    @property
    def gflops(self) -> float:
        """10⁹ floating-point operations."""
        return 2 * self.gmacs


def count_rows(model: str, sample_size: int, schedule: Path | None) -> list[MacRow]:
    """Count a preset, a static model, or a DyDiT's complete, masked and sliced forms.

    Args:
        model: a preset's name, a model's or a run's folder, or a Hub id.
        sample_size: side of a preset's input, latent pixels.
        schedule: export folder to count with the model, or None.

    Raises:
        ConfigError, CheckpointError, ScheduleError: what was given cannot be used.
    """
    plan = None if schedule is None else SubnetSchedule.load(str(schedule))
    if plan is not None:
        return _dynamic_rows(open_dydit(model), plan)
    if _PRESET.fullmatch(model) and not Path(model).exists():
        return [_dense_row(f"{model}, static", _empty_preset(model, sample_size))]
    network = open_model(model)
    return (
        _dynamic_rows(network, None) if isinstance(network, DyDiT) else [_dense_row("static model", network)]
    )


def rows_as_text(rows: Sequence[MacRow]) -> str:
    """A table; GFLOPs = 2 × GMACs."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'one image, one forward':<{width}}  {'GMACs':>10}  {'GFLOPs':>10}  {'of static':>9}"]
    for row in rows:
        share = row.gmacs / rows[0].gmacs
        lines.append(
            f"{row.name:<{width}}  {_figure(row.gmacs):>10}  {_figure(row.gflops):>10}  {share:>9.1%}"
        )
    for row in rows:
        if row.gmacs_range is not None:
            low, high = (_figure(value) for value in row.gmacs_range)
            lines.append(
                f"{row.name}: {low} to {high} GMACs over {row.timesteps} timesteps, on noise (seed 0)"
            )
        for operator, count in row.unsupported.items():
            lines.append(f"{row.name}: not counted: {operator} ({count} times)")
    return "\n".join(lines)


def rows_as_json(model: str, rows: Sequence[MacRow]) -> str:
    """The same for programs."""
    figures = [{**asdict(row), "gflops": row.gflops} for row in rows]
    return json.dumps({"model": model, "unit": "1e9 per image and forward", "rows": figures}, indent=1)


def _dynamic_rows(model: DyDiT, plan: SubnetSchedule | None) -> list[MacRow]:
    rows = [
        _dense_row("static backbone", model.backbone),
        _dense_row("DyDiT as trained (masked, dense)", model),
    ]
    return rows if plan is None else [*rows, _engine_row(SubnetEngine(model, plan), plan)]


def _dense_row(name: str, network: Any) -> MacRow:
    report = _count(network, network.shape, _ANY_TIMESTEP)
    return MacRow(name, report.gmacs, unsupported=report.unsupported)


def _engine_row(engine: SubnetEngine, plan: SubnetSchedule) -> MacRow:
    steps = tqdm(plan.timesteps, desc="counting", unit="timestep")
    reports = [_count(engine, engine.shape, timestep) for timestep in steps]
    gmacs = [report.gmacs for report in reports]
    unsupported: Counter[str] = Counter()
    for report in reports:
        unsupported.update(report.unsupported)
    span = (min(gmacs), max(gmacs))
    return MacRow("engine (sliced)", float(np.mean(gmacs)), len(gmacs), span, dict(unsupported))


def _count(network: nn.Module, shape: Any, timestep: float) -> MacReport:
    """One forward of one image of noise; which tokens an engine keeps depends on the image."""
    noise = torch.randn(1, shape.in_channels, *shape.sample_size, generator=torch.Generator().manual_seed(0))
    dtype = next(network.parameters()).dtype
    return count_macs(network, noise.to(dtype), timestep, torch.zeros(1, dtype=torch.long))


def _empty_preset(name: str, sample_size: int) -> DiT:
    """A preset with memory for its weights and no values: they do not change the count, and take long."""
    with torch.device("meta"):
        model = DiT.from_preset(name, sample_size=sample_size)
    return model.to_empty(device="cpu").eval()


def _figure(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.4g}"
