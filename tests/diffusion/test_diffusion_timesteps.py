from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dydit.diffusion.timesteps import stratified_uniform, to_timesteps, uniform

BATCHES = st.integers(0, 67)
SEEDS = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(BATCHES, SEEDS)
def test_every_quarter_gets_its_share(batch: int, seed: int) -> None:
    points = stratified_uniform(batch, generator=seeded(seed))
    assert points.shape == (batch,) and points.dtype == torch.float32
    assert ((points >= 0) & (points < 1)).all()
    counts = torch.bincount((points * 4).long(), minlength=4)
    assert counts.shape == (4,)
    assert counts.min() >= batch // 4 and counts.max() <= -(-batch // 4)


@given(BATCHES, SEEDS, st.integers(1, 300).map(lambda quarter: 4 * quarter))
def test_every_quarter_of_the_timesteps_gets_its_share(batch: int, seed: int, num_timesteps: int) -> None:
    t = to_timesteps(stratified_uniform(batch, generator=seeded(seed)), num_timesteps)
    assert t.dtype == torch.int64
    counts = torch.bincount(t // (num_timesteps // 4), minlength=4)
    assert counts.shape == (4,)
    assert counts.min() >= batch // 4 and counts.max() <= -(-batch // 4)


@given(st.integers(1, 5000), st.integers(1, 4))
def test_the_last_point_of_a_range_stays_in_it(num_timesteps: int, end: int) -> None:
    boundary = torch.tensor(end / 4)
    last = torch.nextafter(boundary, torch.tensor(0.0))
    assert to_timesteps(last[None], num_timesteps).item() <= (end * num_timesteps - 1) // 4


def test_an_offset_next_to_one_stays_in_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    monkeypatch.setattr(torch, "rand", lambda size, **_: largest.repeat(size))
    points = stratified_uniform(8, generator=seeded(0))
    assert torch.bincount((points * 4).long()).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("position", [0, -1])
def test_every_position_alone_is_uniform(batch: int, position: int) -> None:
    generator, rounds = seeded(batch), 2000
    draws = torch.stack([stratified_uniform(batch, generator=generator)[position] for _ in range(rounds)])
    counts = torch.bincount((draws * 8).long(), minlength=8)
    spread = (rounds * 1 / 8 * 7 / 8) ** 0.5
    assert (counts - rounds / 8).abs().max() < 4.5 * spread
    assert draws.mean().item() == pytest.approx(0.5, abs=4.5 * (1 / 12 / rounds) ** 0.5)


def test_stratified_means_scatter_less() -> None:
    generator = seeded(0)
    stratified = torch.stack([stratified_uniform(8, generator=generator).mean() for _ in range(500)])
    independent = torch.stack([uniform(8, generator=generator).mean() for _ in range(500)])
    assert stratified.std() < 0.4 * independent.std()


@pytest.mark.parametrize("draw", [uniform, stratified_uniform])
def test_the_generator_decides(draw: Callable[..., torch.Tensor]) -> None:
    torch.testing.assert_close(draw(9, generator=seeded(3)), draw(9, generator=seeded(3)), rtol=0, atol=0)
    assert not torch.equal(draw(9, generator=seeded(3)), draw(9, generator=seeded(4)))
    torch.manual_seed(11)
    first = draw(9)
    torch.manual_seed(11)
    torch.testing.assert_close(draw(9), first, rtol=0, atol=0)


@pytest.mark.parametrize("draw", [uniform, stratified_uniform])
def test_a_generator_elsewhere_leaves_the_global_one_alone(draw: Callable[..., torch.Tensor]) -> None:
    before = torch.get_rng_state()
    assert draw(9, generator=seeded(3), device="meta").device.type == "meta"
    assert torch.equal(torch.get_rng_state(), before)
