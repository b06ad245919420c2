from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from dydit.models.embeddings import (
    LabelEmbedder,
    TimestepEmbedder,
    batch_timesteps,
    sincos_position_embedding,
)


@pytest.mark.parametrize(("hidden_size", "side"), [(32, 4), (1152, 16)])
def test_position_embedding_is_diffusers_own(hidden_size: int, side: int) -> None:
    theirs = get_2d_sincos_pos_embed(hidden_size, side, base_size=side, output_type="pt")
    ours = sincos_position_embedding(hidden_size, (side, side))[0]
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-6)


def test_position_embedding_of_a_rectangle_is_part_of_the_squares() -> None:
    square = sincos_position_embedding(32, (6, 6)).view(6, 6, 32)
    assert torch.equal(sincos_position_embedding(32, (2, 6)).view(2, 6, 32), square[:2])
    assert torch.equal(sincos_position_embedding(32, (6, 3)).view(6, 3, 32), square[:, :3])


def test_position_embedding_puts_the_column_first() -> None:
    grid = sincos_position_embedding(8, (3, 5)).view(3, 5, 8)
    assert (grid[..., :4] == grid[:1, :, :4]).all()  # the first half does not change along the rows
    assert (grid[..., 4:] == grid[:, :1, 4:]).all()
    expected = [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]
    assert grid[2, 3, :4].tolist() == pytest.approx(expected, abs=1e-6)


def sinusoid(t: float, frequency_shift: float = 0.0) -> torch.Tensor:
    embedder = TimestepEmbedder(256, frequency_shift)
    embedder.mlp = torch.nn.Sequential(torch.nn.Identity())
    embedder.mlp[0].weight = torch.zeros(1)  # the module's dtype is read off its first layer
    return embedder(torch.tensor([t]))[0]


@pytest.mark.parametrize("t", [0.0, 1.0, 37.5, 999.0])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_timestep_sinusoid_has_cosines_first_and_period_10000(t: float, shift: float) -> None:
    angles = [t * math.exp(-math.log(10000) * k / (128 - shift)) for k in range(128)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    # float32 resolves angles up to 999 to about 6e-5.
    assert sinusoid(t, shift).tolist() == pytest.approx(expected, abs=2e-4)


def test_timestep_embedding_takes_integers_and_follows_the_dtype() -> None:
    embedder = TimestepEmbedder(32)
    t = torch.tensor([0, 500, 999])
    assert torch.equal(embedder(t), embedder(t.float()))
    assert embedder.bfloat16()(t).dtype == torch.bfloat16


def test_the_label_table_ends_with_the_null_class() -> None:
    assert LabelEmbedder(10, 32).embedding_table.weight.shape == (11, 32)


@pytest.mark.parametrize("t", [951, 950.75])
def test_a_timestep_is_float32_whatever_torchs_default_is(t: float) -> None:
    """bfloat16, in which loading code may leave it, has no 951."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = batch_timesteps(t, torch.zeros(2, 3))
    finally:
        torch.set_default_dtype(default)
    assert found.dtype == torch.float32 and found.tolist() == [t, t]
