"""A DyDiT of any size with random weights, whose routers deploy a given share of the static compute.

A benchmark needs no trained weights, but it needs what makes deployment costly: scattered masks that differ
from block to block and change over the timesteps as a trained router's do, a little at a time, and tokens
that are kept or not by what they hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dydit.config import DyDiTConfig
from dydit.costs import outer_macs, static_macs
from dydit.dynamic.compute_loss import deployed_cost, minimum_ratio
from dydit.dynamic.convert import convert
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ConfigError
from dydit.export.schedule import SubnetSchedule
from dydit.models.dit import DiT
from dydit.models.embeddings import sincos_position_embedding
from dydit.routing.gates import logit

MODULATION_STD = 0.3  # of shift, scale and gate: blocks of a trained DiT are far from the identity
LABEL_STD = 0.5
# A component's logit over the timesteps t is offset + swing · √2 · cos(2π(cycles · t/T + phase)), offset
# ~ N(0, 1). With this swing about three fifths of the heads and groups never change.
SWING, MOST_CYCLES, LOGIT_SCALE = 0.4, 1.2, 4.0
RIDGE = 1e-6  # of the least squares, relative to the mean of the diagonal
LARGEST_TIMESTEP = 1000.0
CALIBRATION_SAMPLES = 8


def random_dydit(
    preset: str,
    sample_size: int,
    depth: int | None,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> DyDiT:
    """A converted preset with random weights, routers included, in evaluation.

    Args:
        depth: number of blocks; None: the preset's.

    Raises:
        ConfigError, ShapeError: there is no such preset or size.
    """
    overrides = {} if depth is None else {"depth": depth}
    with torch.device(
        "meta"
    ):  # the usual initialisation of a model of this size takes longer than to time it
        backbone = DiT.from_preset(preset, sample_size=sample_size, **overrides)
    nn.Module.to(backbone, dtype).to_empty(device=device)
    shape = backbone.shape
    backbone.pos_embed.copy_(sincos_position_embedding(shape.hidden_size, shape.grid))
    generator = torch.Generator().manual_seed(seed)
    _fill(backbone, generator)
    model = convert(backbone, DyDiTConfig(rank="none"), copy=False)
    for routers in model.routers:
        if routers.token_router is not None:
            _fill(routers.token_router, generator)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Random weights that keep the size of what passes through; drawn in float32, whatever the dtype."""
    for name, parameter in module.named_parameters():
        modulates = "adaLN_modulation" in name
        if parameter.ndim < 2 and not modulates:
            parameter.zero_()
            continue
        std = MODULATION_STD if modulates else LABEL_STD if "embedding_table" in name else 1.0
        if parameter.ndim > 1 and "embedding_table" not in name:
            std /= math.sqrt(parameter[0].numel())
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def even_share(shape: Any, config: DyDiTConfig, ratio: float) -> float:
    """The share s at which s of the heads, groups and tokens deploy ``ratio`` of the static compute.

    Raises:
        ConfigError: the ratio is below what is always on.
    """
    least = minimum_ratio(shape, config)
    if not least < ratio <= 1:
        raise ConfigError(
            f"--ratio {ratio:g}",
            expected=f"above {least:.3f}, what is always on in this model, and at most 1",
        )
    cost, low, high = deployed_cost(shape, config), 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        full = (shape.num_heads, shape.mlp_groups, shape.tokens)
        macs = outer_macs(shape) + shape.depth * cost.executed(*(share * n for n in full))
        low, high = (share, high) if macs < ratio * static_macs(shape) else (low, share)
    return high


@torch.no_grad()
def route_widths(model: DyDiT, timesteps: Sequence[float], share: float, seed: int) -> None:
    """Set the width routers so that in each block ``share`` of heads and groups run, mean over timesteps."""
    steps = torch.tensor(timesteps, device=next(model.parameters()).device)
    embedding = model.adapter.timestep_embedding(model.backbone, steps).double().cpu()  # (S, D)
    centre = embedding.mean(0)
    kernel = (embedding - centre) @ (embedding - centre).T  # (S, S)
    kernel.diagonal().add_(RIDGE * kernel.diagonal().mean() + torch.finfo(torch.float32).tiny)
    dual = torch.linalg.solve(kernel, embedding - centre)  # (S, D)
    rng = np.random.default_rng(seed)
    for routers in model.routers:
        for router, width in (
            (routers.head_router, model.shape.num_heads),
            (routers.group_router, model.shape.mlp_groups),
        ):
            if router is None:
                continue
            wanted = torch.from_numpy(_smooth_logits(rng, np.asarray(timesteps), router.router.out_features))
            weight = LOGIT_SCALE * (wanted - wanted.mean(0)).T @ dual  # (scores, D)
            bias = LOGIT_SCALE * wanted.mean(0) - weight @ centre
            spared = width - router.router.out_features
            logits = embedding @ weight.T + bias  # (S, scores)
            cut = _threshold(logits, (share * width - spared) / max(1, width - spared))
            router.router.weight.copy_(weight)
            router.router.bias.copy_(bias + logit(model.routing_config.threshold) - cut)


def _smooth_logits(rng: np.random.Generator, timesteps: np.ndarray, components: int) -> np.ndarray:
    """Scores (S, components) that move slowly with the timestep."""
    cycles, phase = rng.uniform(0.2, MOST_CYCLES, components), rng.uniform(0, 1, components)
    angle = 2 * np.pi * (timesteps[:, None] / LARGEST_TIMESTEP * cycles + phase)
    return rng.normal(size=components) + SWING * np.sqrt(2) * np.cos(angle)


def _threshold(values: Tensor, share: float) -> float:
    """A number that ``share`` of the values lie above."""
    ordered = values.flatten().sort(descending=True).values
    above = min(max(round(share * len(ordered)), 0), len(ordered))
    if above == 0:
        return ordered[0].item() + 1.0
    if above == len(ordered):
        return ordered[-1].item() - 1.0
    return (ordered[above - 1].item() + ordered[above].item()) / 2


def token_share(schedule: SubnetSchedule, ratio: float) -> float:
    """The share of tokens at which the schedule's widths deploy ``ratio`` of the static compute."""
    none = schedule.macs_per_timestep(np.zeros(schedule.rows.shape)).mean()
    every = schedule.macs_per_timestep().mean()
    return float(np.clip((ratio * static_macs(schedule.shape) - none) / (every - none), 0.0, 1.0))


@torch.no_grad()
def route_tokens(model: DyDiT, schedule: SubnetSchedule, share: float, seed: int) -> np.ndarray:
    """Set the token routers so that each block keeps ``share`` of the tokens of noise.

    The bias comes from the quantile of the scores that a forward of this very model gives, block by block.

    Returns:
        Tokens kept per sample, interpolated over the schedule's timesteps, int32 (S, L).
    """
    weight, shape = next(model.parameters()), model.shape
    steps = np.asarray(schedule.timesteps)
    chosen = steps[np.linspace(0, len(steps) - 1, min(CALIBRATION_SAMPLES, len(steps))).round().astype(int)]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(chosen), shape.in_channels, *shape.sample_size, generator=generator)
    labels = torch.randint(shape.num_classes, (len(chosen),), generator=generator)
    kept: list[np.ndarray] = []
    cut = logit(model.routing_config.token_threshold)

    def calibrate(router: Any, _inputs: Any, logits: Tensor) -> Tensor:
        shift = cut - _threshold(logits.float(), share)
        router[2].bias.add_(shift)
        kept.append((logits + shift > cut).sum(-1).cpu().numpy())
        return logits + shift

    hooks = [r.token_router.register_forward_hook(calibrate) for r in model.routers if r.token_router]
    try:
        t = torch.tensor(chosen, dtype=torch.float32, device=weight.device)
        model(x.to(weight.device, weight.dtype), t, labels.to(weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    order = np.argsort(chosen)
    columns = [np.interp(steps, chosen[order], counts[order]) for counts in kept]
    return np.stack(columns, axis=1).round().astype(np.int32)
