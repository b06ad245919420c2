"""What a sampling run asks of its model: recorded once, then counted, routed and compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dydit.compute.counting import MacReport, count_macs
from dydit.diffusion import Sampler
from dydit.dynamic.dydit import DyDiT
from dydit.errors import CheckpointError
from dydit.routing.routing import Routing


@dataclass(frozen=True)
class Call:
    """One call of the model in a sampling run: latents x (B, C, height, width), timestep, labels y (B,).

    With guidance B holds both halves.
    """

    x: Tensor
    t: float
    y: Tensor


@torch.no_grad()
def record_calls(sampler: Sampler, model: Any, noise: Tensor, labels: Tensor) -> tuple[Tensor, list[Call]]:
    """Sample from ``noise`` (n, C, height, width) for ``labels`` (n,).

    Returns:
        The samples, and every call that the sampler made, in order.
    """
    calls: list[Call] = []

    def recorded(x: Tensor, t: float, y: Tensor) -> Tensor:
        calls.append(Call(x, t, y))
        return model(x, t, y)

    return sampler.sample(recorded, noise, labels, model.null_label), calls


def count_calls(module: nn.Module, calls: Sequence[Call]) -> list[MacReport]:
    """MACs of each call, executed and counted by fvcore."""
    return [count_macs(module, call.x, call.t, call.y) for call in calls]


@torch.no_grad()
def route_calls(model: DyDiT, calls: Sequence[Call]) -> list[Routing]:
    """What a DyDiT in evaluation decides in each call.

    Raises:
        CheckpointError: a router gives NaN, which would count as closed; names it and the timestep.
    """
    routings = []
    for call in calls:
        routing: Routing = model(call.x, call.t, call.y, return_routing=True)[1]
        if broken := "" if routing.logits is None else routing.logits.first_nan():
            raise CheckpointError(
                f"the logits of router {broken} are NaN at timestep {call.t:g}",
                expected="numbers",
                remedy="take a checkpoint from before the run diverged",
            )
        routings.append(routing)
    return routings


@torch.no_grad()
def largest_difference(model: nn.Module, reference: nn.Module, calls: Sequence[Call]) -> float:
    """Largest relative difference ‖model − reference‖/‖reference‖ over the calls.

    Raises:
        CheckpointError: an output is not finite; names the timestep.
    """
    worst = 0.0
    for call in calls:
        expected = reference(call.x, call.t, call.y)
        seen = model(call.x, call.t, call.y)
        difference = ((seen - expected).norm() / expected.norm()).item()
        if not math.isfinite(difference):
            raise CheckpointError(
                f"an output at timestep {call.t:g} is not finite",
                expected="numbers",
                remedy="take a checkpoint from before the run diverged",
            )
        worst = max(worst, difference)
    return worst


def kept_share(routings: Sequence[Routing]) -> np.ndarray:
    """Share of tokens that enter the MLP, mean over the batch: (S, L) for S routings."""
    return np.stack([r.tokens.float().mean(dim=(0, 2)).cpu().numpy() for r in routings])


def keep_maps(routings: Sequence[Routing], samples: int, grid: tuple[int, int]) -> np.ndarray:
    """Share of blocks in which each image token enters the MLP: (S, samples, rows, columns)."""
    rows, columns = grid
    maps = [r.tokens[:samples, :, : rows * columns].float().mean(dim=1).cpu().numpy() for r in routings]
    return np.stack(maps).reshape(len(routings), samples, rows, columns)
