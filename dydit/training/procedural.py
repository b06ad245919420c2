"""``shapes``: drawn images without end, so that spatial routing has something to learn without a download.

One shape on a textured ground: the ground is the same kind of thing everywhere, the shape's outline is where
detail is needed. An image is a pure function of seed, index and epoch, so nothing is stored and any position
resumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Field = NDArray[np.floating[Any]]

SHAPES_SIDE = 32
# Images in an epoch; those of the next one are others.
SHAPES_PER_EPOCH = 1 << 20
LEAST_CONTRAST = 0.6  # distance of the two colours in [-1, 1]³, so that every shape can be seen
WAVES = 3  # plane waves in a texture


def _ball(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - 1


def _box(x: Field, y: Field) -> Field:
    return np.maximum(abs(x), abs(y)) - 0.85


def _diamond(x: Field, y: Field) -> Field:
    return (abs(x) * 1.6 + abs(y) - 1) / 1.6


def _triangle(x: Field, y: Field) -> Field:
    return np.maximum(abs(x) * 0.866 + y * 0.5, -y) - 0.5


def _ring(x: Field, y: Field) -> Field:
    return abs(np.hypot(x, y) - 0.75) - 0.22


def _cross(x: Field, y: Field) -> Field:
    return np.maximum(np.minimum(abs(x), abs(y)) - 0.3, np.maximum(abs(x), abs(y)) - 1)


def _bar(x: Field, y: Field) -> Field:
    return np.maximum(abs(x) - 1, abs(y) - 0.3)


def _moon(x: Field, y: Field) -> Field:
    return np.maximum(_ball(x, y), 0.85 - np.hypot(x - 0.55, y))


def _star(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - (0.68 + 0.32 * np.cos(5 * np.arctan2(y, x)))


def _pair(x: Field, y: Field) -> Field:
    return np.hypot(abs(x) - 0.6, y) - 0.42


# Class -> signed distance, or near it, to the outline in a frame of half-width 1; inside is negative.
SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    "ball": _ball, "box": _box, "diamond": _diamond, "triangle": _triangle, "ring": _ring,
    "cross": _cross, "bar": _bar, "moon": _moon, "star": _star, "pair": _pair,
}  # fmt: skip


class Shapes:
    """Training samples: item i is (image (3, side, side) float32 in [-1, 1], class of its shape).

    Args:
        side: of the images in pixels.
        seed: other seeds, other images.
    """

    num_classes = len(SHAPES)

    def __init__(self, side: int = SHAPES_SIDE, seed: int = 0) -> None:
        self.side, self.seed = side, seed
        self.sample_shape = (3, side, side)

    def __len__(self) -> int:
        return SHAPES_PER_EPOCH

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng((self.seed, index))
        label = int(rng.integers(self.num_classes))
        return torch.from_numpy(draw_shape(list(SHAPES)[label], self.side, rng)), label

    def redraw(self, index: int, _seed: int, epoch: int) -> tuple[Tensor, int]:
        """Item ``index`` of an epoch: none ever comes twice."""
        return self[index + epoch * len(self)]


def draw_shape(name: str, side: int, rng: np.random.Generator) -> Field:
    """One shape of random place, size, turn and colours on a texture, (3, side, side) in [-1, 1]."""
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    radius, turn = rng.uniform(0.3, 0.6), rng.uniform(0, 2 * math.pi)
    left, top = rng.uniform(radius - 1, 1 - radius, size=2)
    across, down = (x - left) / radius, (y - top) / radius
    u = (math.cos(turn) * across + math.sin(turn) * down).astype(np.float32)
    v = (math.cos(turn) * down - math.sin(turn) * across).astype(np.float32)
    # The outline is one pixel wide: its distance in pixels, clipped.
    inside = np.clip(0.5 - SHAPES[name](u, v) * radius * side / 2, 0, 1)
    ground, colour = _colours(rng)
    image = ground + texture(x, y, rng) * (1 - inside) + (colour - ground) * inside
    return np.clip(image, -1, 1).astype(np.float32)


def texture(x: Field, y: Field, rng: np.random.Generator) -> Field:
    """A sum of a few plane waves (side, side), of amplitude 0.3 at most."""
    total = np.zeros_like(x)
    for _ in range(WAVES):
        turn, frequency = rng.uniform(0, math.pi), rng.uniform(3, 12)
        total += np.sin(frequency * (math.cos(turn) * x + math.sin(turn) * y) + rng.uniform(0, 2 * math.pi))
    return total * (rng.uniform(0.1, 0.3) / WAVES)


def _colours(rng: np.random.Generator) -> tuple[Field, Field]:
    """Two colours (3, 1, 1), apart from each other."""
    while True:
        pair = rng.uniform(-0.9, 0.9, size=(2, 3, 1, 1)).astype(np.float32)
        if np.linalg.norm(pair[0] - pair[1]) >= LEAST_CONTRAST:
            return pair[0], pair[1]
