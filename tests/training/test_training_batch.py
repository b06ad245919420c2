"""Draws are a pure function of seed and step, and every branch shares them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.config import DataConfig, ObjectiveConfig
from dydit.diffusion import make_objective
from dydit.training.batch import DrawKey, Draws, NoisyBatch, draw, noisy_batch
from dydit.training.data import Batch

CPU = torch.device("cpu")
SHAPE = (8, 1, 8, 8)
NULL = 10


def draws(key: DrawKey, shape: tuple[int, ...] = SHAPE, **data: object) -> Draws:
    objective = make_objective(ObjectiveConfig(), learn_sigma=True)
    return draw(key, objective, DataConfig(**data), shape, CPU)


def test_the_same_step_draws_the_same_whatever_the_global_generator_holds() -> None:
    torch.manual_seed(1)
    first = draws(DrawKey(seed=3, step=7))
    torch.manual_seed(2)
    second = draws(DrawKey(seed=3, step=7))
    for name in ("t", "noise", "dropped", "flipped", "first"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("other", [DrawKey(3, 8), DrawKey(4, 7), DrawKey(3, 7, micro=1)])
def test_another_step_seed_or_micro_batch_draws_something_else(other: DrawKey) -> None:
    assert not torch.equal(draws(DrawKey(3, 7)).noise, draws(other).noise)


def test_two_processes_draw_together_what_one_draws_for_a_batch_twice_as_large() -> None:
    whole = draws(DrawKey(0, 5), (16, *SHAPE[1:]), flip=True)
    for rank in range(2):
        mine = draws(DrawKey(0, 5, rank=rank, world=2), flip=True)
        for name in ("t", "noise", "dropped", "flipped"):
            assert torch.equal(getattr(mine, name), getattr(whole, name)[rank::2])
        assert mine.first == whole.first


def test_labels_are_dropped_with_the_configured_probability() -> None:
    shape = (4000, 1, 1, 1)
    assert not draws(DrawKey(0, 0), shape, class_dropout=0.0).dropped.any()
    assert draws(DrawKey(0, 0), shape, class_dropout=1.0).dropped.all()
    assert draws(DrawKey(0, 0), shape, class_dropout=0.1).dropped.float().mean() == pytest.approx(
        0.1, abs=0.02
    )


def test_noisy_batch_mirrors_and_drops_as_drawn() -> None:
    batch = Batch(torch.randn(SHAPE), torch.arange(8))
    drawn = draws(DrawKey(0, 0), flip=True, class_dropout=0.5)
    noisy = noisy_batch(batch, drawn, make_objective(ObjectiveConfig(), True), NULL)
    assert drawn.flipped.any() and not drawn.flipped.all()
    for i in range(8):
        image = batch.images[i].flip(-1) if drawn.flipped[i] else batch.images[i]
        assert torch.equal(noisy.x0[i], image)
        assert noisy.y[i] == (NULL if drawn.dropped[i] else i)


def noisy(batch: int = 8, rank: int = 0, world: int = 1, step: int = 0) -> NoisyBatch:
    """Process ``rank``'s batch; sample k of all processes has label k."""
    shape, labels = (batch, *SHAPE[1:]), torch.arange(batch * world)[rank::world]
    drawn = draws(DrawKey(0, step, rank=rank, world=world), shape, class_dropout=0.0)
    images = Batch(torch.randn(shape), labels)
    return noisy_batch(images, drawn, make_objective(ObjectiveConfig(), True), NULL, rank, world)


def test_a_part_keeps_samples_whole_and_all_of_it_is_the_batch_in_its_order() -> None:
    batch = noisy()
    rows, weights = batch.part(0.3)
    assert len(rows) == len(set(rows.tolist())) == 3 and weights is None
    part = batch.select(rows)
    for i, row in enumerate(rows):
        assert torch.equal(part.x_t[i], batch.x_t[row]) and part.y[i] == batch.y[row]
        assert part.t[i] == batch.t[row] and torch.equal(part.noise[i], batch.noise[row])
    assert batch.part(1.0).rows.tolist() == list(range(8)) and batch.part(1.0).weights is None
    assert len(batch.part(0.01).rows) == 1


def test_every_sample_is_in_the_part_as_often_as_any_other() -> None:
    rows = torch.cat([noisy(step=step).part(0.25).rows for step in range(400)])
    counts = rows.bincount(minlength=8)
    assert counts.sum() == 800 and (counts - 100).abs().max() < 5 * math.sqrt(800 / 8)


@given(
    world=st.integers(1, 5), batch=st.integers(1, 6), fraction=st.floats(0.01, 1.0), step=st.integers(0, 1000)
)
@settings(deadline=None)
def test_any_number_of_processes_sees_the_same_part_at_the_same_weight(
    world: int, batch: int, fraction: float, step: int
) -> None:
    alone = noisy(batch * world, step=step)
    rows = alone.part(fraction).rows
    losses = torch.rand(batch * world, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    ranks = [noisy(batch, rank, world, step) for rank in range(world)]
    parts = [rank.part(fraction) for rank in ranks]
    assert len({len(part.rows) for part in parts}) == 1  # no process waits for another
    seen = []
    for rank, part in zip(ranks, parts, strict=True):
        counts = torch.ones(len(part.rows)) if part.weights is None else part.weights
        seen += rank.y[part.rows[counts > 0]].tolist()
    assert sorted(seen) == sorted(alone.y[rows].tolist())
    means = [part.mean(losses[rank.y[part.rows]]) for rank, part in zip(ranks, parts, strict=True)]
    torch.testing.assert_close(torch.stack(means).mean(), losses[rows].mean(), rtol=1e-6, atol=0)
