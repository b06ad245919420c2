"""The training losses (Zhao et al., DyDiT): pure functions of a model and a noisy batch.

Each returns the scalar to take the gradient of and its parts for the log. Nothing here looks at a value on
the host, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dydit.adapters.registry import adapter_for
from dydit.config import ComputeConfig, WarmupConfig
from dydit.dynamic.compute_loss import MeanOverRanks, compute_loss, pooled_mean, ramped_target
from dydit.routing.gates import centred
from dydit.routing.routing import RoutingLogits
from dydit.training.batch import NoisyBatch
from dydit.training.features import block_outputs, feature_distance


@dataclass(frozen=True)
class LossTerms:
    """A loss and what it is made of.

    Args:
        total: scalar with gradients, weights included.
        parts: detached scalars for the log, before weighting.
    """

    total: Tensor
    parts: dict[str, Tensor]


def diffusion_terms(
    objective: Any, output: Tensor, batch: NoisyBatch, mean: Callable[[Tensor], Tensor] = torch.mean
) -> LossTerms:
    """The objective's own loss, averaged over the batch by ``mean``."""
    loss = objective.loss(output, batch.x0, batch.x_t, batch.noise, batch.t)
    total = mean(loss.total)
    parts = {"loss_diffusion": total.detach(), "loss_mse": mean(loss.mse.detach())}
    if loss.vb is not None:
        parts["loss_vb"] = mean(loss.vb.detach())
    return LossTerms(total, parts)


def static_terms(model: Any, objective: Any, batch: NoisyBatch, weight: float = 1.0) -> LossTerms:
    """Diffusion loss of a static model, weighted."""
    found = diffusion_terms(objective, model(batch.x_t, batch.t, batch.y), batch)
    return LossTerms(weight * found.total, found.parts)


def complete_terms(model: Any, objective: Any, batch: NoisyBatch, warmup: WarmupConfig) -> LossTerms:
    """Warm-up, first way: the complete model (everything on, same weights) under the same diffusion loss.

    Args:
        model: a DyDiT, possibly wrapped.
        objective: the diffusion objective.
        batch: the noisy batch.
        warmup: weight, and the share of the batch.
    """
    part = batch.part(warmup.fraction)
    seen = batch if warmup.fraction == 1 else batch.select(part.rows)
    output = model(seen.x_t, seen.t, seen.y, complete=True)
    terms = diffusion_terms(objective, output, seen, part.mean)
    return LossTerms(warmup.weight * terms.total, {"loss_complete": terms.total.detach()})


def teacher_terms(
    output: Tensor, features: Sequence[Tensor], teacher: Any, batch: NoisyBatch, warmup: WarmupConfig
) -> LossTerms:
    """Warm-up, second way: distance to the frozen backbone on a part of the batch.

    Args:
        output: the dynamic model's prediction (B, C_out, H, W).
        features: its tokens after each block, (B, N, D) each; empty: they are not compared.
        teacher: the frozen backbone; sees the same noise, timesteps and dropped labels.
        batch: the noisy batch.
        warmup: weights, and the share of the batch.
    """
    part = batch.part(warmup.fraction)
    seen = batch.select(part.rows)
    blocks = adapter_for(teacher).blocks(teacher) if features else ()
    with torch.no_grad(), block_outputs(blocks) as wanted:
        target = teacher(seen.x_t, seen.t, seen.y)
    squares = (output[part.rows].float() - target.float()).square()
    distance = part.mean(squares.flatten(1).mean(1))
    total, parts = warmup.weight * distance, {"loss_distill": distance.detach()}
    if features:
        apart = part.mean(feature_distance([tokens[part.rows] for tokens in features], wanted))
        total = total + warmup.feature_weight * apart
        parts["loss_features"] = apart.detach()
    return LossTerms(total, parts)


def indecision(logits: RoutingLogits, width_threshold: float = 0.5, token_threshold: float = 0.5) -> Tensor:
    """Mean over all gates of 4·p·(1 − p), p the probability of being open in training; a scalar in [0, 1].

    0 where every gate is certain: noisy and thresholded gates are then the same. A gate without a router, or
    always on, is certain.

    Args:
        logits: of all gates.
        width_threshold: score at which a head or group is open or closed with even chances.
        token_threshold: the same for tokens.
    """
    parts = [centred(part.float(), width_threshold) for part in (logits.heads, logits.groups)]
    parts.append(centred(logits.tokens.float(), token_threshold))
    scores = torch.cat([part.flatten() for part in parts]).sigmoid()
    return (4 * scores * (1 - scores)).mean()


def dynamic_terms(
    model: Any, objective: Any, batch: NoisyBatch, *, ratio_of: Callable[[Any], Tensor],
    compute: ComputeConfig, step: int, mean_over_ranks: MeanOverRanks,
    diffusion_weight: float = 1.0, decisiveness: float = 0.0, thresholds: tuple[float, float] = (0.5, 0.5),
    teach: Callable[[Tensor, NoisyBatch], LossTerms] | None = None,
) -> LossTerms:  # fmt: skip
    """Diffusion loss of the dynamic model, its compute loss, and what is switched on besides.

    Args:
        model: a DyDiT in training mode, possibly wrapped.
        objective: the diffusion objective.
        batch: the noisy batch.
        ratio_of: Routing -> executed over static MACs (B,).
        compute: target λ, weight, ramp.
        step: optimiser steps done, for the ramp.
        mean_over_ranks: a detached scalar of this process -> its mean over all processes.
        diffusion_weight: weight of the diffusion loss; at 0 it is only logged.
        decisiveness: weight of ``indecision``; 0 leaves it out.
        thresholds: of width and tokens, for ``indecision``.
        teach: (output, batch) -> the warm-up's distance to a teacher, weighted.
    """
    output, routing = model(batch.x_t, batch.t, batch.y, return_routing=True, noise=batch.gates)
    diffusion = diffusion_terms(objective, output, batch)
    ratio = pooled_mean(ratio_of(routing), mean_over_ranks)
    target = ramped_target(step, compute.target, compute.ramp_steps)
    spending = compute_loss(ratio, target)
    # At weight 0 too: every weight has a gradient then, which DDP and the optimiser's state want.
    total = diffusion_weight * diffusion.total + compute.weight * spending
    parts = {**diffusion.parts, "loss_compute": spending.detach(), "ratio": ratio.detach()}
    if decisiveness > 0:
        undecided = indecision(routing.logits, *thresholds)
        total = total + decisiveness * undecided
        parts["indecision"] = undecided.detach()
    if teach is not None:
        taught = teach(output, batch)
        total = total + taught.total
        parts.update(taught.parts)
    return LossTerms(total, parts)
