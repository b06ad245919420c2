"""A summary in words: the sentences and rows that the terminal table and the page both show."""

from __future__ import annotations

from dataclasses import dataclass

from dydit.evaluation.quality import Metric
from dydit.report.summary import Summary

DASH = "–"  # not measured; never 0
FLOPS_PER_MAC = 2  # 1 MAC = one multiply-add


@dataclass(frozen=True)
class ResultRow:
    """One quantity of both networks, with the conditions it was obtained under."""

    quantity: str
    backbone: str
    dydit: str
    comparison: str
    conditions: str


def number(value: float | None) -> str:
    """Up to four significant digits, or a dash."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def measured(value: float | None) -> str:
    """Four significant digits with trailing zeros, as figures in one column should have, or a dash."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def percent(fraction: float | None) -> str:
    return DASH if fraction is None else f"{100 * fraction:.1f} %"


def speedup_text(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}×"


def timestep_text(timestep: float) -> str:
    """A timestep as samplers print it: no decimals where it is whole."""
    return f"{timestep:.1f}".removesuffix(".0")


def metric_text(metric: Metric) -> str:
    if metric.unit == "%":
        return percent(None if metric.value is None else metric.value / 100)
    return DASH if metric.value is None else f"{measured(metric.value)} {metric.unit}".strip()


def result_rows(summary: Summary) -> tuple[ResultRow, ...]:
    """Compute and time, ideal beside measured; the same rows in every report."""
    compute, time = summary.compute, summary.time
    counted, timed = counting_conditions(summary), timing_conditions(summary)
    saved = _of_backbone(compute.ratio)
    static_gmacs, engine_gmacs = _giga(compute.static_macs), _giga(compute.engine_mean_macs)
    return (
        ResultRow("GMACs per image and step", measured(static_gmacs), measured(engine_gmacs), saved, counted),
        ResultRow(
            "GFLOPs per image and step",
            measured(_flops(static_gmacs)),
            measured(_flops(engine_gmacs)),
            saved,
            "2 × GMACs: one multiply-add is two floating-point operations",
        ),
        ResultRow(
            f"time, ms per step (batch of {summary.conditions.batch_size})",
            measured(time.static_median_ms),
            measured(time.engine_median_ms),
            _of_backbone(None if time.speedup is None else 1.0 / time.speedup),
            timed,
        ),
        ResultRow(
            "speed-up, measured",
            "",
            speedup_text(time.speedup),
            spread_text(summary),
            "backbone time / DyDiT time, round by round, under the conditions above",
        ),
        ResultRow(
            "speed-up, ideal",
            "",
            speedup_text(compute.ideal_speedup),
            "",
            "1 / compute ratio: time if it followed MACs",
        ),
        ResultRow("realised share", "", percent(summary.realised_share), "", "measured / ideal speed-up"),
    )


def verdict(summary: Summary) -> tuple[str, ...]:
    """What came out, in one or two sentences that claim no more than was measured."""
    return (_compute_sentence(summary), _time_sentence(summary))


def spread_text(summary: Summary) -> str:
    """Where the middle half of the paired speed-ups lies, or a dash."""
    quartiles = summary.time.speedup_quartiles
    return DASH if quartiles is None else f"middle half of rounds {quartiles[0]:.2f}–{quartiles[2]:.2f}×"


def counting_conditions(summary: Summary) -> str:
    """What the MACs are of and how they were counted."""
    setting, missing = summary.conditions, summary.compute.unsupported
    if summary.compute.static_macs is None and summary.compute.engine_macs is None:
        return "not counted"
    text = (
        f"counted on the networks that ran, routers included; mean over {setting.sampling_steps} "
        f"{setting.sampler} steps, guidance scale {number(setting.guidance_scale)}; "
        f"target λ = {number(setting.target_ratio)}"
    )
    if missing:
        text += "; a lower bound, not counted: " + ", ".join(f"{k} ×{n}" for k, n in sorted(missing.items()))
    return text


def timing_conditions(summary: Summary) -> str:
    """On what and how the time was measured."""
    setting, rounds = summary.conditions, summary.time.engine_ms or summary.time.static_ms
    if rounds is None:
        return "not measured"
    parts = [
        f"median of {len(rounds)} rounds, both networks in turn, over the whole schedule",
        setting.processor or "processor unknown",
        f"{setting.threads} threads" if setting.threads else "",
        setting.dtype,
        f"torch {setting.torch_version}",
    ]
    return "; ".join(part for part in parts if part)


def _compute_sentence(summary: Summary) -> str:
    ratio = summary.compute.ratio
    if ratio is None:
        return "Compute was not counted."
    bound = "at least " if summary.compute.unsupported else ""
    return (
        f"DyDiT executed {bound}{percent(ratio)} of the backbone's multiply-adds per image and sampling step "
        f"(asked for: λ = {number(summary.conditions.target_ratio)})."
    )


def _time_sentence(summary: Summary) -> str:
    quartiles = summary.time.speedup_quartiles
    if quartiles is None:
        return "Time was not measured."
    low, median, high = quartiles
    if high < 1.0:
        return f"It ran slower than the backbone, at {median:.2f}× its speed: no saving shows on the clock."
    if low <= 1.0:
        return f"The clock shows no clear speed-up: {low:.2f}–{high:.2f}× over the middle half of the rounds."
    ideal = summary.compute.ideal_speedup
    beside = (
        f"; {ideal:.2f}× would be ideal: {percent(summary.realised_share)} of it was realised"
        if ideal
        else ""
    )
    return f"On the clock it was {median:.2f}× as fast as the backbone{beside}."


def _of_backbone(share: float | None) -> str:
    return DASH if share is None else f"{percent(share)} of the backbone"


def _giga(macs: float | None) -> float | None:
    return None if macs is None else macs / 1e9


def _flops(macs: float | None) -> float | None:
    return None if macs is None else FLOPS_PER_MAC * macs
