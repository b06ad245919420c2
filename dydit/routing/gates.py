"""Hard gates with a straight-through gradient (Gumbel-sigmoid; Zhao et al., DyDiT, section 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dydit.shapes import ModelShape


@dataclass(frozen=True)
class GateNoise:
    """What chance and schedule give the gates of one forward in training, decided outside of the model.

    A forward that gets it is a pure function of its arguments: gradient checkpointing repeats the same gates,
    and a trainer can deal one draw to several processes.

    Attributes:
        heads: logistic noise (B, L, H).
        groups: logistic noise (B, L, G).
        tokens: logistic noise (B, L, N).
        temperature: of the Gumbel-sigmoid, a number or a scalar tensor; None: the model's own.
    """

    heads: Tensor
    groups: Tensor
    tokens: Tensor
    temperature: Tensor | float | None = None

    @classmethod
    def draw(
        cls, shape: ModelShape, batch: int, generator: torch.Generator | None, device: torch.device
    ) -> GateNoise:
        """Noise for ``batch`` samples."""

        def noise(width: int) -> Tensor:
            return _logistic((batch, shape.depth, width), generator, device)

        return cls(noise(shape.num_heads), noise(shape.mlp_groups), noise(shape.tokens))


def logistic_noise(logits: Tensor) -> Tensor:
    """Noise of the shape of ``logits``, distributed as the difference of two Gumbel samples.

    That difference is a logistic variable, so one uniform draw u gives it: log u − log(1 − u).
    """
    return _logistic(logits.shape, None, logits.device).to(logits.dtype)


def _logistic(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)  # in [0, 1)
    return torch.logit(uniform.clamp_(min=torch.finfo(torch.float32).tiny))


def training_gate(
    logits: Tensor, temperature: float | Tensor, noise: Tensor | None = None, threshold: float = 0.5
) -> Tensor:
    """0/1 gates from noisy logits: hard in the forward, sigmoid((logits − cut + noise)/temperature) backward.

    ``cut`` is the logit of ``threshold``, 0 for the published 0.5. So a gate is open with a probability above
    one half exactly where ``threshold_gate`` opens it: training and deployment mean the same threshold.

    Args:
        logits: any shape; +inf is always on, and NaN gives NaN, never a decision.
        temperature: of the sigmoid.
        noise: logistic, of a shape that broadcasts to ``logits``; None: drawn for every logit from torch's
            global generator.
        threshold: the score above which the gate is open in evaluation.
    """
    noise = logistic_noise(logits) if noise is None else noise.to(logits.dtype)
    soft = torch.sigmoid((centred(logits, threshold) + noise) / temperature)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())


def centred(logits: Tensor, threshold: float) -> Tensor:
    """Logits of the probability that a gate is open in training: ``logits`` minus the threshold's own."""
    cut = logit(threshold)
    return logits - cut if cut else logits


def nested_logits(logits: Tensor) -> Tensor:
    """Logits (..., K) that never rise from one component to the next: the least of those so far.

    A component is then no likelier to be on than any before it. The gradient of each goes to the component
    that held it down.
    """
    return logits.cummin(dim=-1).values


def threshold_gate(logits: Tensor, threshold: float) -> Tensor:
    """0/1 gates without noise: 1 where sigmoid(logits) > threshold."""
    return (logits > logit(threshold)).to(logits.dtype)


def logit(probability: float) -> float:
    """The logit that a score of ``probability`` comes from; ±inf at 1 and 0."""
    if probability <= 0.0:
        return -math.inf
    return math.inf if probability >= 1.0 else math.log(probability) - math.log1p(-probability)
