"""One step's random draws, and the noisy batch that all branches of the loss share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
        order: (B,) int64, a permutation; its head is the part that the warm-up term sees.
        gates: noise of the routers' gates; None for a static model.
    """

    t: Tensor
    noise: Tensor
    dropped: Tensor
    flipped: Tensor
    order: Tensor
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
        order=uniform().argsort(),
        gates=None if routed is None else _gate_noise(key, routed, whole, generator, device),
    )


def _gate_noise(
    key: DrawKey, shape: ModelShape, whole: int, generator: torch.Generator, device: torch.device
) -> GateNoise:
    drawn = GateNoise.draw(shape, whole, generator, device)
    return GateNoise(key.mine(drawn.heads), key.mine(drawn.groups), key.mine(drawn.tokens))


@dataclass(frozen=True)
class NoisyBatch:
    """A batch as the loss sees it; every branch gets this very one.

    Args:
        x0: clean images or latents (B, C, H, W).
        noise: (B, C, H, W).
        x_t: the two mixed according to ``t`` (B, C, H, W).
        t: timesteps (B,).
        y: labels (B,), some of them already the null class.
        order: (B,) random permutation for ``part``.
        gates: noise of the gates; a part of a batch has none, as only complete models see one.
    """

    x0: Tensor
    noise: Tensor
    x_t: Tensor
    t: Tensor
    y: Tensor
    order: Tensor
    gates: GateNoise | None = None

    def part(self, fraction: float) -> NoisyBatch:
        """A random ``fraction`` of the batch, at least one sample; 1 is the batch itself."""
        size = math.ceil(fraction * len(self.t))
        if size == len(self.t):
            return self
        keep = self.order[:size]
        fields = (self.x0, self.noise, self.x_t, self.t, self.y, self.order)
        x0, noise, x_t, t, y, order = (field[keep] for field in fields)
        return NoisyBatch(x0, noise, x_t, t, y, order)


def noisy_batch(batch: Batch, draws: Draws, objective: Any, null_label: int | Tensor | None) -> NoisyBatch:
    """Mirror, corrupt, and drop labels as drawn."""
    images = batch.images
    x0 = torch.where(draws.flipped[:, None, None, None], images.flip(-1), images)
    return NoisyBatch(
        x0=x0,
        noise=draws.noise,
        x_t=objective.corrupt(x0, draws.noise, draws.t),
        t=draws.t,
        y=_without(batch.labels, draws.dropped, null_label),
        order=draws.order,
        gates=draws.gates,
    )


def _without(labels: Tensor, dropped: Tensor, null_label: int | Tensor | None) -> Tensor:
    """Labels (B,) or text tokens (B, M, context_dim), with ``null_label`` where ``dropped`` (B,)."""
    if null_label is None:
        return labels
    return torch.where(dropped.view(-1, *[1] * (labels.ndim - 1)), null_label, labels)
