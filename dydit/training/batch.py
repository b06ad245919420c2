"""One step's random draws, and the noisy batch that all branches of the loss share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dydit.config import DataConfig
from dydit.routing.gates import GateNoise
from dydit.shapes import ModelShape
from dydit.training.data import Batch


@dataclass(frozen=True)
class Draws:
    """What chance decides for one batch of one process.

    Args:
        t: timesteps (B,).
        noise: (B, C, H, W), standard normal.
        dropped: (B,) bool, labels that become the null class.
        flipped: (B,) bool, images that are mirrored left to right.
        first: (), int64, position in the batch of all processes where the part begins that the warm-up sees.
        gates: noise of the routers' gates; None for a static model.
    """

    t: Tensor
    noise: Tensor
    dropped: Tensor
    flipped: Tensor
    first: Tensor
    gates: GateNoise | None = None


@dataclass(frozen=True)
class DrawKey:
    """Which batch the draws are for: they are a pure function of this and of the settings.

    So resuming at a step repeats its draws without any saved state, and one process with a batch of 2B draws
    what two processes with B draw: process ``rank`` has every ``world``-th sample of the batch of all.
    """

    seed: int
    step: int
    micro: int = 0
    rank: int = 0
    world: int = 1

    def generator(self, device: torch.device) -> torch.Generator:
        """A generator for this step, the same on every rank."""
        state = np.random.SeedSequence((self.seed, self.step, self.micro)).generate_state(2)
        return torch.Generator(device).manual_seed(int(state[0]) << 32 | int(state[1]))

    def mine(self, whole: Tensor) -> Tensor:
        """This rank's part of something drawn for all ranks."""
        return whole[self.rank :: self.world]


def draw(
    key: DrawKey, objective: Any, data: DataConfig, shape: tuple[int, ...], device: torch.device,
    routed: ModelShape | None = None,
) -> Draws:  # fmt: skip
    """Draw timesteps, noise, dropped labels, flips and the gates' noise for a batch of this process.

    Timesteps are stratified over the batch of all processes (DyDiT: the batch mean of the compute ratio then
    estimates its mean over t).

    Args:
        key: seed, step, micro-batch and rank.
        objective: its ``sample_t`` draws the timesteps.
        data: for the probabilities.
        shape: (B, C, H, W) of this process's batch.
        device: where the tensors are wanted.
        routed: shape of the dynamic model whose gates need noise; None for a static one.
    """
    generator = key.generator(device)
    whole = shape[0] * key.world

    def uniform() -> Tensor:
        return key.mine(torch.rand(whole, generator=generator, device=device))

    return Draws(
        t=key.mine(objective.sample_t(whole, generator=generator, device=device)),
        noise=key.mine(torch.randn(whole, *shape[1:], generator=generator, device=device)),
        dropped=uniform() < data.class_dropout,
        flipped=uniform() < (0.5 if data.flip else 0.0),
        first=torch.randint(whole, (), generator=generator, device=device),
        gates=None if routed is None else _gate_noise(key, routed, whole, generator, device),
    )


def _gate_noise(
    key: DrawKey, shape: ModelShape, whole: int, generator: torch.Generator, device: torch.device
) -> GateNoise:
    drawn = GateNoise.draw(shape, whole, generator, device)
    return GateNoise(key.mine(drawn.heads), key.mine(drawn.groups), key.mine(drawn.tokens))


class Part(NamedTuple):
    """This process's share of a random part of the batch of all processes.

    Attributes:
        rows: which samples of this process's batch, int64 (m,).
        weights: (m,), such that the sum of weights × losses, averaged over all processes, is the mean loss
            over the part; None where that is the plain mean over ``rows``.
    """

    rows: Tensor
    weights: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the part of ``values`` (m,), one per row."""
        return values.mean() if self.weights is None else (self.weights * values).sum()


@dataclass(frozen=True)
class NoisyBatch:
    """A batch as the loss sees it; every branch gets this very one.

    Args:
        x0: clean images or latents (B, C, H, W).
        noise: (B, C, H, W).
        x_t: the two mixed according to ``t`` (B, C, H, W).
        t: timesteps (B,).
        y: labels (B,), some of them already the null class.
        first: where ``part`` begins (see ``Draws``).
        rank, world: this process holds every ``world``-th sample of the batch of all, from ``rank`` on.
        gates: noise of the gates; a part of a batch has none, as only complete models see one.
    """

    x0: Tensor
    noise: Tensor
    x_t: Tensor
    t: Tensor
    y: Tensor
    first: Tensor
    rank: int = 0
    world: int = 1
    gates: GateNoise | None = None

    def part(self, fraction: float) -> Part:
        """This process's share of ``fraction`` of the batch of all processes, at least one sample of it.

        The part is a window, from a random place on and round the end, of samples whose order is random
        already. So it is the same samples for any number of processes, and each has as many of them as any
        other, give or take one: who has one less takes a sample besides, at no weight.
        """
        whole = len(self.t) * self.world
        size = math.ceil(fraction * whole)
        if size == whole:
            return Part(torch.arange(len(self.t), device=self.t.device))
        share = math.ceil(size / self.world)
        mine = (self.rank - self.first) % self.world  # the window's first sample that is here
        places = mine + self.world * torch.arange(share, device=self.t.device)  # within the window
        rows = (self.first + places) % whole // self.world
        if size % self.world == 0:
            return Part(rows)
        return Part(rows, (places < size) * (self.world / size))

    def select(self, rows: Tensor) -> NoisyBatch:
        """The samples ``rows`` (m,) as a batch of its own, without noise for gates."""
        fields = (self.x0, self.noise, self.x_t, self.t, self.y)
        x0, noise, x_t, t, y = (field[rows] for field in fields)
        return NoisyBatch(x0, noise, x_t, t, y, self.first, self.rank, self.world)


def noisy_batch(
    batch: Batch, draws: Draws, objective: Any, null_label: int | Tensor | None, rank: int = 0, world: int = 1
) -> NoisyBatch:
    """Mirror, corrupt, and drop labels as drawn for process ``rank`` of ``world``."""
    images = batch.images
    x0 = torch.where(draws.flipped[:, None, None, None], images.flip(-1), images)
    return NoisyBatch(
        x0=x0,
        noise=draws.noise,
        x_t=objective.corrupt(x0, draws.noise, draws.t),
        t=draws.t,
        y=_without(batch.labels, draws.dropped, null_label),
        first=draws.first,
        rank=rank,
        world=world,
        gates=draws.gates,
    )


def _without(labels: Tensor, dropped: Tensor, null_label: int | Tensor | None) -> Tensor:
    """Labels (B,) or text tokens (B, M, context_dim), with ``null_label`` where ``dropped`` (B,)."""
    if null_label is None:
        return labels
    return torch.where(dropped.view(-1, *[1] * (labels.ndim - 1)), null_label, labels)
