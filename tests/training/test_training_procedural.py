"""Drawn shapes: a pure function of seed and index, that any position of a run can ask for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dydit.config import DataConfig
from dydit.models.dit import DiT
from dydit.training.data import make_dataset
from dydit.training.order import Visit
from dydit.training.procedural import SHAPES, Shapes, draw_shape
from dydit.training.samples import CheckedSamples, GoodSample


def test_an_image_depends_on_seed_and_index_alone() -> None:
    first, again, other = Shapes(), Shapes(), Shapes(seed=1)
    assert again[7][1] == first[7][1] and torch.equal(again[7][0], first[7][0])
    torch.testing.assert_close(first[123_456][0], again[123_456][0], rtol=0, atol=0)
    assert not torch.equal(first[7][0], first[8][0]) and not torch.equal(first[7][0], other[7][0])


def test_images_are_in_range_and_have_texture_and_every_class_comes() -> None:
    shapes = Shapes()
    images, labels = zip(*(shapes[i] for i in range(200)), strict=True)
    stack = torch.stack(images)
    assert stack.shape[1:] == (3, 32, 32) == shapes.sample_shape and stack.dtype == torch.float32
    assert stack.min() >= -1 and stack.max() <= 1 and stack.std(dim=(2, 3)).min() > 0.01
    assert set(labels) == set(range(10)) and shapes.num_classes == 10
    assert len(shapes) > 1_000_000


def test_no_image_comes_again_in_the_next_epoch() -> None:
    shape = DiT(sample_size=32, patch_size=8, in_channels=3, hidden_size=16, depth=1, num_heads=2).shape
    first, second = (CheckedSamples(Shapes(), shape)[Visit(3, epoch)] for epoch in (0, 1))
    assert isinstance(first, GoodSample) and isinstance(second, GoodSample)
    assert torch.equal(first.image, Shapes()[3][0]) and not torch.equal(first.image, second.image)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_there_and_leaves_room_for_the_ground(name: str) -> None:
    for seed in range(5):
        axis = np.linspace(-1.5, 1.5, 64, dtype=np.float32)
        inside = SHAPES[name](*np.meshgrid(axis, axis)) < 0
        assert 0.03 < inside.mean() < 0.6
        image = draw_shape(name, 32, np.random.default_rng(seed))
        assert image.shape == (3, 32, 32) and image.dtype == np.float32


def test_no_two_shapes_are_the_same() -> None:
    axis = np.linspace(-1.2, 1.2, 48, dtype=np.float32)
    masks = [outline(*np.meshgrid(axis, axis)) < 0 for outline in SHAPES.values()]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            assert (one ^ other).mean() > 0.03


def test_the_configuration_chooses_size_and_seed() -> None:
    made = make_dataset(DataConfig(name="shapes", image_size=16, seed=3))
    image, label = made[5]
    expected, wanted = Shapes(16, seed=3)[5]
    assert torch.equal(image, expected) and label == wanted
    assert make_dataset(DataConfig(name="shapes")).sample_shape == (3, 32, 32)
