"""The training losses (Zhao et al., DyDiT): pure functions of a model and a noisy batch.

Each returns the scalar to take the gradient of and its parts for the log. Nothing here looks at a value on
the host, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dydit.config import ComputeConfig
from dydit.dynamic.compute_loss import compute_loss, ramped_target
from dydit.training.batch import NoisyBatch

MeanOverRanks = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossTerms:
    """A loss and what it is made of.

    Args:
        total: scalar with gradients, weights included.
        parts: detached scalars for the log, before weighting.
    """

    total: Tensor
    parts: dict[str, Tensor]


def diffusion_terms(objective: Any, output: Tensor, batch: NoisyBatch) -> LossTerms:
    """The objective's own loss, averaged over the batch."""
    loss = objective.loss(output, batch.x0, batch.x_t, batch.noise, batch.t)
    total = loss.total.mean()
    parts = {"loss_diffusion": total.detach(), "loss_mse": loss.mse.detach().mean()}
    if loss.vb is not None:
        parts["loss_vb"] = loss.vb.detach().mean()
    return LossTerms(total, parts)


def static_terms(model: Any, objective: Any, batch: NoisyBatch) -> LossTerms:
    """Diffusion loss of a static model."""
    return diffusion_terms(objective, model(batch.x_t, batch.t, batch.y), batch)


def complete_terms(model: Any, objective: Any, batch: NoisyBatch, weight: float) -> LossTerms:
    """Warm-up, first way: the complete model (everything on, same weights) under the same diffusion loss."""
    terms = diffusion_terms(objective, model(batch.x_t, batch.t, batch.y, complete=True), batch)
    return LossTerms(weight * terms.total, {"loss_complete": terms.total.detach()})


def distillation_loss(output: Tensor, teacher: Any, batch: NoisyBatch, fraction: float = 1.0) -> Tensor:
    """Warm-up, second way: mean squared distance to the frozen backbone's output on a part of the batch."""
    part = batch.part(fraction)
    with torch.no_grad():
        wanted = teacher(part.x_t, part.t, part.y)
    mine = output if part is batch else output[batch.order[: len(part.t)]]
    return F.mse_loss(mine.float(), wanted.float())


def dynamic_terms(
    model: Any, objective: Any, batch: NoisyBatch, *, ratio_of: Callable[[Any], Tensor],
    compute: ComputeConfig, step: int, mean_over_ranks: MeanOverRanks,
    distill: Callable[[Tensor, NoisyBatch], Tensor] | None = None, distill_weight: float = 1.0,
) -> LossTerms:  # fmt: skip
    """Diffusion loss of the dynamic model, its compute loss and, with ``distill``, the distance to a teacher.

    Args:
        model: a DyDiT in training mode, possibly wrapped.
        objective: the diffusion objective.
        batch: the noisy batch.
        ratio_of: Routing -> executed over static MACs (B,).
        compute: target λ, weight, ramp.
        step: optimiser steps done, for the ramp.
        mean_over_ranks: a detached scalar of this process -> its mean over all processes.
        distill: (output, batch) -> extra loss.
        distill_weight: its weight.
    """
    output, routing = model(batch.x_t, batch.t, batch.y, return_routing=True)
    diffusion = diffusion_terms(objective, output, batch)
    ratio = pooled_mean(ratio_of(routing), mean_over_ranks)
    target = ramped_target(step, compute.target, compute.ramp_steps)
    spending = compute_loss(ratio, target)
    total = diffusion.total + compute.weight * spending
    parts = {**diffusion.parts, "loss_compute": spending.detach(), "ratio": ratio.detach()}
    if distill is not None:
        distance = distill(output, batch)
        total = total + distill_weight * distance
        parts["loss_distill"] = distance.detach()
    return LossTerms(total, parts)


def pooled_mean(values: Tensor, mean_over_ranks: MeanOverRanks) -> Tensor:
    """Mean of ``values`` over the batches of all processes, with the gradient that averaging needs.

    The value is the mean over all ranks (squaring each rank's own mean would be another loss); the gradient
    is this rank's, d mean(values). DDP and FSDP then average gradients over ranks, so for L = (m − λ)² they
    arrive at (1/W) Σ_r 2 (m − λ) dm_r = dL: exact with equal batches, and no collective in the backward.
    """
    local = values.mean()
    # local + 0 in the value, so that one process alone gets its own mean to the bit
    return local + (mean_over_ranks(local.detach()) - local.detach())
