"""The figure of a benchmark."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dydit.benchmark.results import STATIC, Benchmark, Case
from dydit.report.plots import ACCENT_COLOR, BACKBONE_COLOR, DYDIT_COLOR, png_bytes

_MODE_COLORS = {"exact": DYDIT_COLOR, "capacity": ACCENT_COLOR}
_DTYPE_LINES = {"fp32": "-", "bf16": "--", "fp16": ":"}
_AXES = {"batch": "batch (images per call)", "tokens": "tokens per image", "depth": "blocks"}


def draw(found: Benchmark) -> bytes:
    """A PNG: the realised share along what was swept, or measured beside ideal speed-up."""
    sweep = found.settings.get("sweep")
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes: Axes = figure.subplots()
    if not found.cases:
        return png_bytes(figure)
    if sweep in _AXES:
        _draw_sweep(axes, found, sweep)
    else:
        _draw_bars(axes, found)
    axes.set_title(
        f"{found.settings['subject']}, {found.machine.name}, {found.machine.threads} threads",
        fontsize=10,
    )
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=4)
    return png_bytes(figure)


def _draw_sweep(axes: Axes, found: Benchmark, sweep: str) -> None:
    lines: dict[tuple[Any, ...], list[Case]] = defaultdict(list)
    for case in found.cases:
        for mode in case.modes:
            lines[case.dtype, mode, None if sweep == "batch" else case.batch].append(case)
    for (dtype, mode, batch), cases in lines.items():
        places = [getattr(case, sweep) for case in cases]
        shares = [case.share(mode) for case in cases]
        label = f"{dtype}, {mode}" + ("" if batch is None else f", batch {batch}")
        middle = [s.median for s in shares]
        spans = [[s.median - s.low for s in shares], [s.high - s.median for s in shares]]
        axes.errorbar(
            places, middle, yerr=spans, label=label, marker="o", capsize=3,
            color=_MODE_COLORS[mode], linestyle=_DTYPE_LINES[dtype],
        )  # fmt: skip
    axes.axhline(1.0, color=BACKBONE_COLOR, linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = sorted({getattr(case, sweep) for case in found.cases})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel=_AXES[sweep], ylabel="share of the ideal speed-up")


def _draw_bars(axes: Axes, found: Benchmark) -> None:
    entries = [(case, mode) for case in found.cases for mode in case.modes]
    for place, (case, mode) in enumerate(entries):
        speedup = case.speedup(mode)
        first = place == 0
        axes.bar(
            place, case.ideal(mode), width=0.75, fill=False, edgecolor=BACKBONE_COLOR, linewidth=1.2,
            label="ideal, from MACs" if first else None,
        )  # fmt: skip
        axes.bar(
            place, speedup.median, width=0.55, color=_MODE_COLORS[mode],
            yerr=[[speedup.median - speedup.low], [speedup.high - speedup.median]], capsize=3,
            label=f"measured, {mode}" if mode not in [m for _, m in entries[:place]] else None,
        )  # fmt: skip
        axes.annotate(
            f"{case.share(mode).median:.0%}",
            (place, min(speedup.median, 1.0) / 2),  # below the line at 1
            ha="center",
            va="center",
            color="white",
            fontsize=9,
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(
        range(len(entries)), [f"{case.dtype}\nbatch {case.batch}" for case, _ in entries], fontsize=8
    )
    axes.set_ylabel(f"speed-up over the {STATIC} backbone")
