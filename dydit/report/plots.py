"""PNG figures: pure functions from arrays to matplotlib figures, no global pyplot state."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from dydit.report.results import measured, percent, timestep_text
from dydit.report.summary import ComputeResult, CurvePoint, TimeResult

# Distinguishable for colour-blind readers and in grey print.
BACKBONE_COLOR, DYDIT_COLOR, ACCENT_COLOR = "#8a94a6", "#0f6cbd", "#c2410c"
WIDTH_CMAP, TOKEN_CMAP = "Blues", "YlGnBu"
GROUND = 0.87  # grey between pictures
STEP_AXIS = "timestep t (noise → image)"


def sample_grids(
    backbone: NDArray, dydit: NDArray, labels: NDArray, per_class: int = 6, most_classes: int = 10
) -> Figure:
    """Two mosaics side by side, a row per class; equal places hold equal noise.

    Args:
        backbone, dydit: (n, C, height, width) in [−1, 1].
        labels: (n,) classes.
        per_class: columns at most.
        most_classes: rows at most; the lowest labels are shown.
    """
    classes = np.unique(labels)[:most_classes]
    figure = Figure(figsize=(8.6, 0.75 + 0.62 * len(classes)), layout="constrained")
    for axes, images, title in zip(
        figure.subplots(1, 2), (backbone, dydit), ("static backbone", "DyDiT, sliced engine"), strict=True
    ):
        rows = [images[labels == label][:per_class] for label in classes]
        _show_mosaic(axes, rows, per_class, [str(label) for label in classes])
        axes.set_title(title)
        axes.set_ylabel("class")
    return figure


def width_per_timestep(timesteps: NDArray, heads: NDArray, groups: NDArray) -> Figure:
    """Active width: a heat map block × timestep for attention heads and for MLP groups, and their means.

    Args:
        timesteps: (S,). heads: (S, L, H) bool. groups: (S, L, G) bool.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(3, 1, height_ratios=[1, 1, 0.9])
    for axis, active, name in ((axes[0], heads, "attention heads"), (axes[1], groups, "MLP channel groups")):
        image = axis.imshow(
            active.mean(axis=2).T, aspect="auto", cmap=WIDTH_CMAP, vmin=0, vmax=1, origin="lower"
        )
        axis.set_title(f"{name} active, of {active.shape[2]} per block", fontsize=10)
        axis.set_ylabel("block")
        axis.set_yticks(*_block_ticks(active.shape[1]))
        _label_steps(axis, timesteps, "")
    figure.colorbar(image, ax=axes[:2], label="fraction active", shrink=0.8)
    steps = np.arange(len(timesteps))
    axes[2].plot(steps, heads.mean(axis=(1, 2)), color=DYDIT_COLOR, label="attention heads")
    axes[2].plot(
        steps, groups.mean(axis=(1, 2)), color=ACCENT_COLOR, linestyle="--", label="MLP channel groups"
    )
    axes[2].set(ylim=(0, 1.05), xlim=(-0.5, len(steps) - 0.5), ylabel="mean over blocks")
    axes[2].legend(frameon=False, ncols=2, loc="lower center")
    axes[2].grid(alpha=0.3)
    _label_steps(axes[2], timesteps, STEP_AXIS)
    return figure


def token_pictures(timesteps: NDArray, images: NDArray, keep_maps: NDArray) -> Figure:
    """What was computed where: x_t of a few images above the share of blocks that ran each token's MLP.

    Args:
        timesteps: (S',). images: (S', K, C, height, width). keep_maps: (S', K, rows, columns) in [0, 1].
    """
    columns, examples = images.shape[:2]
    figure = Figure(figsize=(0.9 + 1.1 * columns, 2.25 * examples + 0.9), layout="constrained")
    axes = figure.subplots()
    # Tiles are 1 × 1, all on one pair of axes: many small axes would take seconds to lay out.
    tops = [2.25 * example for example in range(examples)]
    for column in range(columns):
        left = 1.1 * column
        for example, top in enumerate(tops):
            image, kept = images[column, example], keep_maps[column, example]
            axes.imshow(_to_rgb(image), extent=(left, left + 1, top + 1, top), interpolation="nearest")
            axes.add_patch(Rectangle((left, top), 1, 1, fill=False, edgecolor="0.6", linewidth=0.5))
            across = np.linspace(left, left + 1, kept.shape[1] + 1)
            down = np.linspace(top + 1.08, top + 2.08, kept.shape[0] + 1)
            drawn = axes.pcolormesh(
                across, down, kept, cmap=TOKEN_CMAP, vmin=0, vmax=1, edgecolors="white", linewidth=0.5
            )
    axes.set(xlim=(-0.03, 1.1 * columns - 0.07), ylim=(2.25 * examples - 0.14, -0.03), aspect="equal")
    axes.set_xticks([1.1 * column + 0.5 for column in range(columns)])
    axes.set_xticklabels([f"t = {timestep_text(timestep)}" for timestep in timesteps])
    axes.set_yticks([top + row for top in tops for row in (0.5, 1.58)], ["image", "tokens"] * examples)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=9)
    axes.spines[:].set_visible(False)
    label = "share of blocks that run the token's MLP"
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.6, location="bottom", aspect=40, pad=0.02)
    return figure


def training_curves(points: Sequence[CurvePoint]) -> Figure:
    """Loss on the left, compute ratio (trained, evaluated, target) on the right, over steps."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [point.step for point in points]
    left.plot(*_gapless(steps, [point.loss for point in points]), color=DYDIT_COLOR)
    left.set(xlabel="training step", ylabel="diffusion loss")
    for name, style, color in (
        ("ratio_train", "-", DYDIT_COLOR),
        ("ratio_eval", "o-", ACCENT_COLOR),
        ("target", ":", "black"),
    ):
        label = {"ratio_train": "in training", "ratio_eval": "as exported", "target": "target"}[name]
        values = [getattr(point, name) for point in points]
        right.plot(*_gapless(steps, values), style, color=color, markersize=3.5, label=label)
    right.set(xlabel="training step", ylabel="executed / static MACs", ylim=(0, 1.05))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def compute_and_time_bars(compute: ComputeResult, time: TimeResult) -> Figure:
    """Compute beside time, each as a share of the backbone: equal lengths mean a fully realised saving.

    The black line on the time spans the middle half of the rounds.
    """
    figure = Figure(figsize=(8.6, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":", zorder=0)
    quartiles = time.speedup_quartiles
    share = None if quartiles is None else 1 / quartiles[1]
    ends = [1.0, compute.ratio, None if quartiles is None else 1 / quartiles[0]]  # of what is drawn
    clock = f", {measured(time.engine_median_ms)} instead of {measured(time.static_median_ms)} ms per step"
    for place, (value, color, text) in enumerate(
        (
            (1.0, BACKBONE_COLOR, "100 %"),
            (compute.ratio, DYDIT_COLOR, f"{percent(compute.ratio)} of the MACs"),
            (share, ACCENT_COLOR, f"{percent(share)} of the time{clock}"),
        )
    ):
        axes.barh(place, value or 0.0, color=color, height=0.62)
        written = text if value is not None else "not measured"
        inside = (
            value is not None and value > 0.6
        )  # long bars carry their text, short ones have it beside them
        axes.annotate(
            written,
            (0.0 if inside or value is None else ends[place], place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color="white" if inside else "black",
        )
    if quartiles is not None:
        axes.plot([1 / quartiles[2], 1 / quartiles[0]], [2, 2], color="black", linewidth=1.6)
    axes.set_yticks(range(3), ["static backbone", "DyDiT, compute", "DyDiT, time"])
    axes.invert_yaxis()
    axes.set_xlabel("share of the static backbone")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def png_bytes(figure: Figure, dpi: int = 144) -> bytes:
    """The figure as a PNG file's content; the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _show_mosaic(axes: Axes, rows: Sequence[NDArray], per_row: int, names: Sequence[str]) -> None:
    """Images in a grid on pale grey, so that white ones have an edge; absent ones leave it empty."""
    channels, height, width = rows[0].shape[1:]
    gap = max(1, height // 8)
    canvas = np.full((len(rows) * (height + gap) - gap, per_row * (width + gap) - gap, 3), GROUND)
    for r, images in enumerate(rows):
        for c, image in enumerate(images):
            top, left = r * (height + gap), c * (width + gap)
            canvas[top : top + height, left : left + width] = _to_rgb(image)
    axes.imshow(canvas, interpolation="nearest")
    axes.set_yticks([r * (height + gap) + height / 2 - 0.5 for r in range(len(rows))], names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _to_rgb(image: NDArray) -> NDArray:
    """(C, h, w) in [−1, 1] → (h, w, 3) in [0, 1]; anything but three channels is shown as their mean."""
    visible = np.clip((np.asarray(image, dtype=np.float64) + 1.0) / 2.0, 0.0, 1.0)
    if visible.shape[0] != 3:
        visible = np.repeat(visible.mean(axis=0, keepdims=True), 3, axis=0)
    return visible.transpose(1, 2, 0)


def _block_ticks(depth: int) -> tuple[list[int], list[str]]:
    places = list(range(0, depth, max(1, depth // 8)))
    return places, [str(place + 1) for place in places]


def step_ticks(timesteps: NDArray, most: int = 10) -> tuple[list[int], list[str]]:
    """Positions and names of at most about ``most`` sampling steps, evenly apart, the last one included.

    Steps are drawn at even distances, whatever their timesteps.
    """
    last = len(timesteps) - 1
    stride = max(1, -(-last // max(most - 1, 1)))
    places = [place for place in range(0, last, stride) if last - place > stride // 2] + [last]
    return places, [timestep_text(timesteps[place]) for place in places]


def _label_steps(axes: Axes, timesteps: NDArray, label: str) -> None:
    axes.set_xticks(*step_ticks(timesteps))
    axes.set_xlabel(label)


def _gapless(steps: Sequence[int], values: Sequence[float | None]) -> tuple[list[int], list[float]]:
    """Only the steps at which the value was logged: a ratio measured seldom is still one line."""
    logged = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    return [step for step, _ in logged], [value for _, value in logged]
