from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dydit.report import plots
from dydit.report.summary import ComputeResult, Summary, TimeResult


def pixels(figure: Figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(plots.png_bytes(figure, dpi=60))).convert("RGB"))


FIGURES: dict[str, Callable[[Summary], Figure]] = {
    "samples": lambda s: plots.sample_grids(
        s.arrays.backbone_samples,  # type: ignore[arg-type]
        s.arrays.dydit_samples,  # type: ignore[arg-type]
        s.arrays.sample_labels,  # type: ignore[arg-type]
    ),
    "width": lambda s: plots.width_per_timestep(s.arrays.timesteps, s.arrays.heads, s.arrays.groups),  # type: ignore[arg-type]
    "tokens": lambda s: plots.token_pictures(
        s.arrays.keep_timesteps,  # type: ignore[arg-type]
        s.arrays.keep_images,  # type: ignore[arg-type]
        s.arrays.keep_maps,  # type: ignore[arg-type]
    ),
    "training": lambda s: plots.training_curves(s.training),
    "bars": lambda s: plots.compute_and_time_bars(s.compute, s.time),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_figure_is_blank(name: str, summary: Summary) -> None:
    assert pixels(FIGURES[name](summary)).std() > 10


def test_sample_grid_puts_classes_in_rows_and_models_side_by_side() -> None:
    labels = np.array([1, 0, 1, 0, 0])
    images = np.full((5, 1, 4, 4), -1.0)
    images[labels == 1] = 1.0
    figure = plots.sample_grids(images, -images, labels, per_class=2)
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["0", "1"]
    mosaic = left.images[0].get_array()
    assert mosaic is not None
    assert mosaic.shape == (2 * 4 + 1, 2 * 4 + 1, 3)  # two rows and columns of 4 pixels, a gap of 1
    assert mosaic[0, 0, 0] == 0.0 and mosaic[-1, 0, 0] == 1.0  # class 0 is black, class 1 white
    assert right.images[0].get_array()[0, 0, 0] == 1.0  # type: ignore[index]


def test_colour_images_keep_their_colours_and_other_channels_are_averaged() -> None:
    labels = np.array([0])
    red = np.stack([np.ones((2, 2)), -np.ones((2, 2)), -np.ones((2, 2))])[None]
    canvas = plots.sample_grids(red, red, labels, per_class=1).axes[0].images[0].get_array()
    assert canvas is not None and canvas[0, 0].tolist() == [1.0, 0.0, 0.0]
    latent = np.zeros((1, 4, 2, 2))
    canvas = plots.sample_grids(latent, latent, labels, per_class=1).axes[0].images[0].get_array()
    assert canvas is not None and canvas[0, 0].tolist() == [0.5, 0.5, 0.5]


def test_heat_map_shows_the_fraction_of_heads() -> None:
    heads = np.zeros((3, 2, 4), bool)
    heads[1, 0, :3] = True
    shown = plots.width_per_timestep(np.array([9.0, 5.0, 0.0]), heads, heads).axes[0].images[0].get_array()
    assert shown is not None
    np.testing.assert_allclose(shown, [[0.0, 0.75, 0.0], [0.0, 0.0, 0.0]])  # block × step


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 20, 50, 250, 1000])
def test_step_ticks_are_few_even_and_include_both_ends(count: int) -> None:
    places, names = plots.step_ticks(np.arange(count, dtype=float)[::-1], most=10)
    assert (places[0], places[-1], len(places)) == (0, count - 1, len(names))
    assert len(places) <= 10
    assert len(set(np.diff(places[:-1]))) <= 1


def test_bars_say_what_was_not_measured() -> None:
    figure = plots.compute_and_time_bars(ComputeResult(static_macs=2.0, engine_macs=(1.0,)), TimeResult())
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "100 %",
        "50.0 % of the MACs",
        "not measured",
    ]
