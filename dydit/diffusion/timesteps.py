"""Drawing training timesteps: uniform, or stratified so that one batch estimates the mean over t."""

from __future__ import annotations

import torch
from torch import Tensor

# Four equal ranges per batch: DyDiT's compute loss squares a batch mean, so the mean's noise is a bias.
STRATA = 4


def uniform(
    batch: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent draws from [0, 1). (B,) float32 on ``device``, drawn where the generator lives."""
    return torch.rand(batch, generator=generator, device=_source(generator, device)).to(device)


def stratified_uniform(
    batch: int,
    *,
    strata: int = STRATA,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws from [0, 1) that are spread over equal ranges: [k/strata, (k+1)/strata) for k = 0 ... strata−1.

    Each range gets batch // strata draws; the remainder goes to ranges chosen at random, at most
    one more each. Ranges are dealt to the positions in the batch at random, so every element alone
    is uniform on [0, 1), for any batch size.

    Args:
        batch: B, number of draws.
        strata: number of ranges.
        generator: source of randomness; the draws do not depend on ``device`` if one is given.
        device: where the result lies; None: with the generator, or torch's default.

    Returns:
        (B,) float32 in [0, 1).
    """
    source = _source(generator, device)
    # Whole rounds over all ranges, then a last round cut short: its order decides who gets the remainder.
    last_round = torch.randperm(strata, generator=generator, device=source)[: batch % strata]
    whole_rounds = torch.arange(batch - len(last_round), device=source) % strata
    positions = torch.randperm(batch, generator=generator, device=source)
    stratum = torch.cat([whole_rounds, last_round])[positions].float()
    offset = torch.rand(batch, generator=generator, device=source)
    # k + u can round up to k + 1, which belongs to the next range (or, for the last one, to none).
    point = torch.minimum(stratum + offset, torch.nextafter(stratum + 1.0, stratum))
    return (point / strata).to(device)


def to_timesteps(point: Tensor, num_timesteps: int) -> Tensor:
    """From [0, 1) to the integers 0 ... T−1. (B,) float -> (B,) int64"""
    return (point * num_timesteps).long()


def _source(
    generator: torch.Generator | None, device: torch.device | str | None
) -> torch.device | str | None:
    return device if generator is None else generator.device
