"""The figures of the page: each with its title, its caption, and what it says to who cannot see it."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from dydit.report import charts, plots
from dydit.report.results import number, percent, speedup_text, spread_text
from dydit.report.summary import Summary

PER_CLASS = 6

# Only buttons that work on the page itself: none that sends the chart to a server.
CHART_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "plotlyServerURL": "",
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
}


@dataclass(frozen=True)
class PageFigure:
    """One figure of the page: a chart with a picture to fall back on, a picture alone, or not recorded.

    Attributes:
        name: of the element and of the PNG file.
        title, caption: what it shows, and how to read it.
        alt: what a reader who cannot see it is told.
        picture: PNG content, None where there is only a chart, or nothing.
        chart: HTML of the interactive chart, or None.
    """

    name: str
    title: str
    caption: str
    alt: str
    picture: bytes | None = None
    chart: Markup | None = None

    @property
    def recorded(self) -> bool:
        return self.picture is not None or self.chart is not None

    @property
    def data_uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.picture or b"").decode()


def page_figures(summary: Summary) -> tuple[PageFigure, ...]:
    """Every figure of the page in its order; those without data say so on the page."""
    return (
        _samples_figure(summary),
        _bars_figure(summary),
        _width_figure(summary),
        _macs_figure(summary),
        _tokens_figure(summary),
        _pictures_figure(summary),
        _training_figure(summary),
    )


def _samples_figure(summary: Summary) -> PageFigure:
    arrays = summary.arrays
    picture = None
    if arrays.backbone_samples is not None and arrays.dydit_samples is not None:
        assert arrays.sample_labels is not None  # SummaryArrays takes the three together
        picture = plots.png_bytes(
            plots.sample_grids(arrays.backbone_samples, arrays.dydit_samples, arrays.sample_labels, PER_CLASS)
        )
    return PageFigure(
        "samples",
        "Samples, side by side",
        "Equal places started from equal noise and class. The images are the first of each class.",
        "Two grids of generated images, a row per class: static backbone on the left, DyDiT on the right.",
        picture,
    )


def _bars_figure(summary: Summary) -> PageFigure:
    known = summary.compute.ratio is not None or summary.time.speedup is not None
    return PageFigure(
        "compute_and_time",
        "Compute saved, time saved",
        "If time followed compute exactly, the two lower bars would be equally long; the difference is "
        "overhead and work that does not shrink with width. The black line is the middle half of the rounds.",
        f"Bar chart: DyDiT executes {percent(summary.compute.ratio)} of the backbone's MACs; "
        f"its measured speed-up is {speedup_text(summary.time.speedup)}, {spread_text(summary)}.",
        plots.png_bytes(plots.compute_and_time_bars(summary.compute, summary.time)) if known else None,
        _chart("bars", charts.bars_chart(summary.compute, summary.time)) if known else None,
    )


def _width_figure(summary: Summary) -> PageFigure:
    arrays = summary.arrays
    picture, chart, first_to_last = None, None, "not recorded"
    if arrays.timesteps is not None and arrays.heads is not None and arrays.groups is not None:
        data = (arrays.timesteps, arrays.heads, arrays.groups)
        picture = plots.png_bytes(plots.width_per_timestep(*data))
        chart = _chart("width", charts.width_chart(*data))
        shares = arrays.heads.mean(axis=(1, 2)), arrays.groups.mean(axis=(1, 2))
        first_to_last = " and ".join(
            f"{name} go from {percent(share[0])} in the first step to {percent(share[-1])} in the last"
            for name, share in zip(("active heads", "active MLP groups"), shares, strict=True)
        )
    return PageFigure(
        "width",
        "Width per timestep",
        "Timestep-wise dynamic width: which part of each block runs depends on the timestep alone, so every "
        "sampling step is a static, smaller network.",
        f"Heat maps of active width, block by timestep; {first_to_last}.",
        picture,
        chart,
    )


def _macs_figure(summary: Summary) -> PageFigure:
    timesteps, macs = summary.arrays.timesteps, summary.compute.engine_macs
    chart = None
    if timesteps is not None and macs is not None:
        setting = summary.conditions
        bars = charts.macs_chart(timesteps, macs, summary.compute.static_macs, setting.target_ratio)
        chart = _chart("macs", bars)
    return PageFigure(
        "macs",
        "MACs per timestep",
        "Multiply-adds executed for one image in each step, routers included: width and tokens together.",
        f"Bar chart of MACs executed per sampling step: {percent(summary.compute.ratio)} of the backbone's.",
        chart=chart,
    )


def _tokens_figure(summary: Summary) -> PageFigure:
    arrays = summary.arrays
    chart, mean = None, None
    if arrays.timesteps is not None and arrays.tokens_kept is not None:
        chart = _chart("tokens", charts.tokens_chart(arrays.timesteps, arrays.tokens_kept))
        mean = float(np.mean(arrays.tokens_kept))
    return PageFigure(
        "tokens",
        "Tokens kept per timestep",
        "Spatial-wise dynamic tokens: the share of tokens whose MLP runs, as the mean over images. The other "
        "tokens pass by on the residual; attention always sees every token.",
        f"Heat map of tokens kept, block by timestep; {percent(mean)} on average.",
        chart=chart,
    )


def _pictures_figure(summary: Summary) -> PageFigure:
    arrays = summary.arrays
    picture = None
    if arrays.keep_timesteps is not None and arrays.keep_images is not None and arrays.keep_maps is not None:
        picture = plots.png_bytes(
            plots.token_pictures(arrays.keep_timesteps, arrays.keep_images, arrays.keep_maps)
        )
    return PageFigure(
        "token_pictures",
        "Where the tokens were kept",
        "A few images on their way from noise to picture, above a map of their tokens: the darker a token, "
        "the more blocks ran their MLP for it.",
        "Rows of partly denoised images, each above a map of how often each of its tokens was kept.",
        picture,
    )


def _training_figure(summary: Summary) -> PageFigure:
    points = summary.training
    ends = "not recorded"
    if points:
        losses = [point.loss for point in points if point.loss is not None]
        ends = f"loss from {number(losses[0])} to {number(losses[-1])}" if losses else "no loss logged"
    return PageFigure(
        "training",
        "Fine-tuning",
        "The compute ratio follows a target that falls from 1 to λ. Routers are noisy in training and fixed "
        "at export, so the two ratios can differ; the exported one counts.",
        f"Curves over training steps of the diffusion loss and the compute ratio: {ends}.",
        plots.png_bytes(plots.training_curves(points)) if points else None,
        _chart("training", charts.training_chart(points)) if points else None,
    )


def _chart(name: str, figure: go.Figure) -> Markup:
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"chart-{name}",
        default_height=f"{figure.layout.height}px",
        config=CHART_CONFIG,
    )
    return Markup(html)
