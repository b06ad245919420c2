"""Hard gates with a straight-through gradient (Gumbel-sigmoid; Zhao et al., DyDiT, section 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logistic_noise(logits: Tensor) -> Tensor:
    """Noise of the shape of ``logits``, distributed as the difference of two Gumbel samples.

    That difference is a logistic variable, so one uniform draw u gives it: log u − log(1 − u).
    """
    uniform = torch.rand(logits.shape, device=logits.device, dtype=torch.float32)  # in [0, 1)
    return torch.logit(uniform.clamp_(min=torch.finfo(torch.float32).tiny)).to(logits.dtype)


def training_gate(logits: Tensor, temperature: float) -> Tensor:
    """0/1 gates from noisy logits: hard in the forward, sigmoid((logits + noise)/temperature) backward."""
    soft = torch.sigmoid((logits + logistic_noise(logits)) / temperature)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())


def threshold_gate(logits: Tensor, threshold: float) -> Tensor:
    """0/1 gates without noise: 1 where sigmoid(logits) > threshold."""
    return (logits > logit(threshold)).to(logits.dtype)


def logit(probability: float) -> float:
    """The logit that a score of ``probability`` comes from; ±inf at 1 and 0."""
    if probability <= 0.0:
        return -math.inf
    return math.inf if probability >= 1.0 else math.log(probability) - math.log1p(-probability)
