"""Draws are a pure function of seed and step, and every branch shares them."""

from __future__ import annotations

import pytest
import torch

from dydit.config import DataConfig, ObjectiveConfig
from dydit.diffusion import make_objective
from dydit.training.batch import DrawKey, Draws, draw, noisy_batch
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
    for name in ("t", "noise", "dropped", "flipped", "order"):
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


def test_a_part_keeps_samples_whole_and_all_of_it_is_the_batch_itself() -> None:
    batch = Batch(torch.randn(SHAPE), torch.arange(8))
    noisy = noisy_batch(batch, draws(DrawKey(0, 0)), make_objective(ObjectiveConfig(), True), NULL)
    part = noisy.part(0.3)
    assert len(part.t) == 3
    for i, source in enumerate(noisy.order[:3]):
        assert torch.equal(part.x_t[i], noisy.x_t[source]) and part.y[i] == noisy.y[source]
    assert noisy.part(1.0) is noisy
    assert len(noisy.part(0.01).t) == 1
