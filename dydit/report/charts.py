"""Interactive charts of the page: pure functions from arrays to plotly figures.

Every chart puts the sampling steps at even distances from left (noise) to right (image) and names
them by their timestep, so that charts above each other can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from dydit.report.plots import ACCENT_COLOR, BACKBONE_COLOR, DYDIT_COLOR, STEP_AXIS, step_ticks
from dydit.report.results import DASH, percent, timestep_text
from dydit.report.summary import ComputeResult, CurvePoint, TimeResult

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MAX_TICKS = 7  # legible on a telephone


def bars_chart(compute: ComputeResult, time: TimeResult) -> go.Figure:
    """Compute beside time, each as a share of the backbone; the error bar spans the middle half of rounds."""
    quartiles = time.speedup_quartiles
    share = None if quartiles is None else 1 / quartiles[1]
    figure = go.Figure()
    for name, value, color in (
        ("backbone", 1.0, BACKBONE_COLOR),
        ("compute", compute.ratio, DYDIT_COLOR),
        ("time", share, ACCENT_COLOR),
    ):
        spread = None
        if name == "time" and quartiles is not None and share is not None:
            spread = {"array": [1 / quartiles[0] - share], "arrayminus": [share - 1 / quartiles[2]]}
        bar = go.Bar(
            x=[value],
            y=[name if value is not None else f"{name} ({DASH})"],
            orientation="h",
            marker_color=color,
            text=[f"<b>{percent(value)}</b>"],
            textposition="inside",
            insidetextanchor="start",
            textfont={"color": "white", "size": 15},
            error_x=spread,
            hovertemplate=f"{name}: %{{x:.1%}} of the backbone<extra></extra>",
        )
        figure.add_trace(bar)
    figure.update_xaxes(tickformat=".0%", title_text="share of the static backbone", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", ticksuffix="  ")
    return _style(figure, height=280).update_layout(showlegend=False, margin={"b": 50, "l": 80})


def width_chart(timesteps: NDArray, heads: NDArray, groups: NDArray) -> go.Figure:
    """Heads and MLP groups active: heat map block × timestep each, and the mean over blocks.

    Args:
        timesteps: (S,). heads: (S, L, H) bool. groups: (S, L, G) bool.
    """
    titles = [
        f"attention heads active, of {heads.shape[2]} per block",
        f"MLP groups active, of {groups.shape[2]} per block",
        "mean over blocks",
    ]
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.09, subplot_titles=titles)
    for row, active, word in ((1, heads, "heads"), (2, groups, "groups")):
        figure.add_trace(_width_map(active, word, timesteps), row=row, col=1)
        figure.update_yaxes(title_text="block", row=row, col=1)
    for active, name, color, dash in (
        (heads, "attention heads", DYDIT_COLOR, "solid"),
        (groups, "MLP channel groups", ACCENT_COLOR, "dash"),
    ):
        mean = active.mean(axis=(1, 2))
        figure.add_trace(_line(mean, timesteps, name, color, dash, f"%{{y:.0%}} of {name}"), row=3, col=1)
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%", row=3, col=1)
    figure.update_layout(coloraxis=_share_axis("Blues", "active", 0.31))
    return _finish(figure, timesteps, height=720)


def tokens_chart(timesteps: NDArray, tokens_kept: NDArray) -> go.Figure:
    """Fraction of tokens whose MLP runs: heat map block × timestep, and the mean over blocks.

    Args:
        timesteps: (S,). tokens_kept: (S, L) in [0, 1].
    """
    titles = ["tokens kept per block", "mean over blocks"]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.13, subplot_titles=titles)
    figure.add_trace(_map(tokens_kept.T, timesteps, "%{z:.0%} of the tokens"), row=1, col=1)
    mean = tokens_kept.mean(axis=1)
    kept = _line(mean, timesteps, "tokens kept", DYDIT_COLOR, "solid", "%{y:.0%} of the tokens")
    figure.add_trace(kept.update(showlegend=False), row=2, col=1)
    figure.update_yaxes(title_text="block", row=1, col=1)
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%", row=2, col=1)
    figure.update_layout(coloraxis=_share_axis("YlGnBu", "kept", 0.5))
    return _finish(figure, timesteps, height=480).update_layout(margin_b=55)


def macs_chart(
    timesteps: NDArray, engine_macs: Sequence[float], static_macs: float | None, target_ratio: float
) -> go.Figure:
    """Executed GMACs per image at every timestep, beside the backbone, the mean and the target.

    Args:
        timesteps: (S,). engine_macs: S values. static_macs: of the backbone. target_ratio: λ.
    """
    gmacs = np.asarray(engine_macs) / 1e9
    bars = _steps(timesteps, "%{y:.4g} GMACs")
    figure = go.Figure(go.Bar(y=gmacs, name="DyDiT, executed", marker_color=DYDIT_COLOR, **bars))
    levels = [("DyDiT, mean", float(gmacs.mean()), ACCENT_COLOR, "dash")]
    if static_macs is not None:
        levels.append(("static backbone", static_macs / 1e9, BACKBONE_COLOR, "solid"))
        levels.append((f"target, λ = {target_ratio:g}", target_ratio * static_macs / 1e9, "black", "dot"))
    for name, level, color, dash in levels:
        figure.add_trace(
            _line(np.full(len(gmacs), level), timesteps, name, color, dash, f"{name} %{{y:.4g}} GMACs")
        )
    figure.update_yaxes(title_text="GMACs per image and step", rangemode="tozero")
    return _finish(figure, timesteps, height=420)


def training_chart(points: Sequence[CurvePoint]) -> go.Figure:
    """Diffusion loss above, compute ratio (in training, as exported, target) below, over training steps."""
    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.12,
        subplot_titles=["diffusion loss", "compute ratio"],
    )
    for row, field, name, color, dash in (
        (1, "loss", "loss", DYDIT_COLOR, "solid"),
        (2, "ratio_train", "in training", DYDIT_COLOR, "solid"),
        (2, "ratio_eval", "as exported", ACCENT_COLOR, "solid"),
        (2, "target", "target", "black", "dot"),
    ):
        logged = [
            (point.step, getattr(point, field)) for point in points if getattr(point, field) is not None
        ]
        trace = go.Scatter(
            x=[step for step, _ in logged],
            y=[value for _, value in logged],
            name=name,
            showlegend=row == 2,
            mode="lines+markers" if field == "ratio_eval" else "lines",
            line={"color": color, "dash": dash, "width": 2},
            hovertemplate=f"step %{{x}}: {name} %{{y:.3g}}<extra></extra>",
        )
        figure.add_trace(trace, row=row, col=1)
    figure.update_yaxes(range=[0, 1.05], row=2, col=1)
    figure.update_xaxes(title_text="training step", row=2, col=1)
    return _style(figure, height=520)


def _width_map(active: NDArray, word: str, timesteps: NDArray) -> go.Heatmap:
    total = active.shape[2]
    counts = {"text": active.sum(axis=2).T}
    return _map(active.mean(axis=2).T, timesteps, f"%{{text}} of {total} {word}").update(counts)


def _map(shares: NDArray, timesteps: NDArray, text: str) -> go.Heatmap:
    """Heat map of ``shares`` (L, S); ``text`` follows the block and the timestep when pointed at."""
    depth, count = shares.shape
    return go.Heatmap(
        z=shares,
        x=list(range(count)),
        y=list(range(1, depth + 1)),
        coloraxis="coloraxis",
        customdata=[[timestep_text(timestep) for timestep in timesteps]] * depth,
        hovertemplate=f"t = %{{customdata}}, block %{{y}}: {text}<extra></extra>",
    )


def _line(values: NDArray, timesteps: NDArray, name: str, color: str, dash: str, text: str) -> go.Scatter:
    """Line through ``values`` (S,), with ``text`` after the timestep when pointed at."""
    return go.Scatter(
        y=values,
        name=name,
        mode="lines",
        line={"color": color, "dash": dash, "width": 2},
        **_steps(timesteps, text),
    )


def _steps(timesteps: NDArray, text: str) -> dict[str, object]:
    """Even x positions, with the timestep named when pointed at."""
    return {
        "x": list(range(len(timesteps))),
        "customdata": [timestep_text(timestep) for timestep in timesteps],
        "hovertemplate": f"t = %{{customdata}}: {text}<extra></extra>",
    }


def _share_axis(scale: str, word: str, length: float) -> dict[str, object]:
    """Colours from 0 to 1, the bar beside the topmost heat map, which takes ``length`` of the height."""
    title = {"text": word, "font": {"size": 13}}
    bar = {"title": title, "tickformat": ".0%", "thickness": 12, "len": length, "y": 1, "yanchor": "top"}
    return {"colorscale": scale, "cmin": 0, "cmax": 1, "colorbar": bar}


def _finish(figure: go.Figure, timesteps: NDArray, height: int) -> go.Figure:
    """Name the sampling steps by their timesteps and apply the common style."""
    places, names = step_ticks(timesteps, MAX_TICKS)
    figure.update_xaxes(tickvals=places, ticktext=names, tickangle=0, showgrid=False, zeroline=False)
    lowest = len(list(figure.select_xaxes()))
    figure.update_xaxes(title_text=STEP_AXIS, selector=lowest - 1)
    return _style(figure, height)


def _style(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        height=height,
        font={"family": FONT, "size": 13, "color": "#1f2937"},
        margin={"l": 56, "r": 16, "t": 60, "b": 90},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        hoverlabel={"font": {"family": FONT}},
    )
    figure.update_xaxes(title_font_size=13, ticks="outside", ticklen=4, tickcolor="white")
    figure.update_yaxes(title_font_size=13)
    figure.update_annotations(font_size=13, x=0, xanchor="left")  # titles of subplots, clear of the buttons
    return figure
