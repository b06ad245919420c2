"""The figure of a benchmark."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from dydit.benchmark.page import title
from dydit.benchmark.results import STATIC, Benchmark, Case
from dydit.report.plots import ACCENT_COLOR, BACKBONE_COLOR, DYDIT_COLOR, png_bytes

_COLORS = {STATIC: BACKBONE_COLOR, "exact": DYDIT_COLOR, "capacity": ACCENT_COLOR}
_DTYPE_LINES = {"fp32": "-", "bf16": "--", "fp16": ":"}
_MARKERS = "osD^v"  # of batches, where something else is swept
_AXES = {"batch": "batch (images per call)", "tokens": "tokens per image", "depth": "blocks"}


def draw(found: Benchmark) -> bytes:
    """A PNG: realised share and time along what was swept, or measured beside ideal speed-up."""
    sweep = found.settings.get("sweep")
    figure = Figure(figsize=(11.0, 4.4) if sweep in _AXES else (8.0, 4.2), layout="constrained")
    if not found.cases:
        return png_bytes(figure)
    if sweep in _AXES:
        share, time = figure.subplots(1, 2)
        _draw_shares(share, found, sweep)
        _draw_times(time, found, sweep)
    else:
        _draw_bars(figure.subplots(), found)
    figure.suptitle(f"{title(found)}, {found.machine.threads} threads", fontsize=10)
    for axes in figure.axes:
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=4, handlelength=3)
    return png_bytes(figure)


def _draw_shares(axes: Axes, found: Benchmark, sweep: str) -> None:
    for (dtype, mode, batch), cases in _lines(found, sweep).items():
        if mode == STATIC:
            continue
        shares = [case.share(mode) for case in cases]
        middle = [s.median for s in shares]
        spans = [[s.median - s.low for s in shares], [s.high - s.median for s in shares]]
        axes.errorbar(
            [getattr(case, sweep) for case in cases], middle, yerr=spans, capsize=3,
            marker=_marker(found, batch), color=_COLORS[mode], linestyle=_DTYPE_LINES[dtype],
            label=_label(dtype, mode, batch),
        )  # fmt: skip
    axes.axhline(1.0, color=BACKBONE_COLOR, linewidth=1)
    _scale(axes, found, sweep)
    axes.set_ylabel("share of the ideal speed-up")


def _draw_times(axes: Axes, found: Benchmark, sweep: str) -> None:
    for (dtype, mode, batch), cases in _lines(found, sweep).items():
        axes.plot(
            [getattr(case, sweep) for case in cases],
            [float(np.median(case.times(mode))) / case.batch for case in cases],
            marker=_marker(found, batch), color=_COLORS[mode], linestyle=_DTYPE_LINES[dtype],
            label=_label(dtype, mode, batch) if mode == STATIC else None,  # modes have one by their share
        )  # fmt: skip
    _scale(axes, found, sweep)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())  # 60, where the default writes 6·10¹
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_ylabel("milliseconds per image in a call")


def _lines(found: Benchmark, sweep: str) -> dict[tuple[str, str, int | None], list[Case]]:
    """(dtype, static or mode, batch unless that is what is swept) -> cases."""
    lines: dict[tuple[str, str, int | None], list[Case]] = defaultdict(list)
    for case in found.cases:
        for mode in (STATIC, *case.modes):
            lines[case.dtype, mode, None if sweep == "batch" else case.batch].append(case)
    return lines


def _marker(found: Benchmark, batch: int | None) -> str:
    batches = sorted({case.batch for case in found.cases})
    return _MARKERS[0 if batch is None else batches.index(batch) % len(_MARKERS)]


def _label(dtype: str, mode: str, batch: int | None) -> str:
    return f"{dtype}, {mode}" + ("" if batch is None else f", batch {batch}")


def _scale(axes: Axes, found: Benchmark, sweep: str) -> None:
    axes.set_xscale("log", base=2)
    ticks = sorted({getattr(case, sweep) for case in found.cases})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel(_AXES[sweep])


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
            place, speedup.median, width=0.55, color=_COLORS[mode],
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
