"""The page: one HTML file that needs no network, rendered from a summary folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dydit.files import write_file
from dydit.report import results
from dydit.report.page_figures import PageFigure, page_figures
from dydit.report.storage import load_summary
from dydit.report.summary import Summary
from dydit.report.table import outcome

REPORT_NAME = "report.html"
FIGURES_FOLDER = "figures"


def render_report(folder: str | Path) -> Path:
    """Render ``folder/report.html`` and ``folder/figures/*.png`` from the summary saved there.

    The page holds everything it shows: scripts and pictures are inlined, and its content security policy
    forbids any request.

    Returns:
        The path of the page.

    Raises:
        DataError: the summary is missing or damaged.
        OutputError: the folder cannot be written to.
    """
    summary = load_summary(folder)
    figures = page_figures(summary)
    for figure in figures:
        if figure.picture is not None:
            write_file(Path(folder) / FIGURES_FOLDER / f"{figure.name}.png", figure.picture)
    path = Path(folder) / REPORT_NAME
    write_file(path, render_page(summary, figures))
    return path


def render_page(summary: Summary, figures: tuple[PageFigure, ...]) -> str:
    """The page as text. Everything from the summary is escaped."""
    environment = Environment(
        loader=PackageLoader("dydit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=results.number, metric=results.metric_text, outcome=outcome)
    return environment.get_template("report.html.j2").render(
        summary=summary,
        conditions=_condition_rows(summary),
        key_figures=_key_figures(summary),
        verdict=results.verdict(summary),
        rows=results.result_rows(summary),
        steps=_step_rows(summary),
        figures=figures,
        plotly_js=Markup(get_plotlyjs()) if any(figure.chart for figure in figures) else None,
        dash=results.DASH,
    )


def _key_figures(summary: Summary) -> list[tuple[str, str, str]]:
    """(name, figure, remark) of the cards at the top: compute, time, what one made of the other, quality."""
    compute, time = summary.compute, summary.time
    cards = [
        (
            "Compute",
            results.percent(compute.ratio),
            f"of the backbone's MACs (λ = {results.number(summary.conditions.target_ratio)})",
        ),
        (
            "Speed-up, measured",
            results.speedup_text(time.speedup),
            "median of paired rounds, engine beside backbone",
        ),
        ("Speed-up, ideal", results.speedup_text(compute.ideal_speedup), "if time followed the MACs"),
        ("Realised", results.percent(summary.realised_share), "measured / ideal speed-up"),
    ]
    by_role = {row.role: row for row in summary.quality}
    if "dydit" in by_role and by_role["dydit"].metrics:
        metric = by_role["dydit"].metrics[0]
        others = ", ".join(
            f"{row.label} {results.metric_text(row.metrics[0])}"
            for row in summary.quality
            if row.role != "dydit"
        )
        cards.append((metric.name, results.metric_text(metric), f"{metric.better} is better; {others}"))
    return cards


def _condition_rows(summary: Summary) -> list[tuple[str, Any]]:
    setting = summary.conditions
    return [
        ("Model", setting.model),
        ("Fine-tuned on", setting.dataset),
        ("Target compute ratio λ", results.number(setting.target_ratio)),
        ("Training steps", results.number(setting.training_steps)),
        ("Sampler", f"{setting.sampler}, {setting.sampling_steps} steps"),
        ("Guidance scale", results.number(setting.guidance_scale)),
        ("Seed", setting.seed),
        ("Batch when counting and timing", setting.batch_size),
        ("Processor", setting.processor or results.DASH),
        ("CPU threads", setting.threads or results.DASH),
        ("Number format", setting.dtype),
        ("Software", f"dydit {setting.dydit_version}, torch {setting.torch_version}"),
        ("Command", setting.command or results.DASH),
    ]


def _step_rows(summary: Summary) -> list[tuple[str, ...]]:
    """(timestep, GMACs, heads, groups, tokens) of every sampling step, in words: the charts' numbers."""
    arrays, macs = summary.arrays, summary.compute.engine_macs
    if arrays.timesteps is None or arrays.heads is None or arrays.groups is None:
        return []
    kept = arrays.tokens_kept
    return [
        (
            results.timestep_text(timestep),
            results.number(macs[step] / 1e9 if macs is not None else None),
            results.percent(arrays.heads[step].mean()),
            results.percent(arrays.groups[step].mean()),
            results.percent(None if kept is None else float(kept[step].mean())),
        )
        for step, timestep in enumerate(arrays.timesteps)
    ]
