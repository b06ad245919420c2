"""Classifier-free guidance (Ho & Salimans): one call of the model on a doubled batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The model under a sampler: x (B, C, H, W), t one Python number for the whole batch, y (B,) int64.
Denoiser = Callable[[Tensor, float, Tensor], Tensor]


def guide(conditional: Tensor, null: Tensor, scale: float, guided_channels: int) -> Tensor:
    """null + s·(conditional − null) on the first channels, conditional on the others. (B, C', H, W)

    With s = 1 + w this is eq. 6 of Ho & Salimans. Published DiT samples guide three channels of
    four; variance channels come last and are never guided.
    """
    first_conditional, first_null = conditional[:, :guided_channels], null[:, :guided_channels]
    guided = first_null + scale * (first_conditional - first_null)
    return torch.cat([guided, conditional[:, guided_channels:]], dim=1)


def guided_output(
    model: Denoiser,
    x: Tensor,
    t: float,
    labels: Tensor,
    null_label: int,
    *,
    scale: float,
    guided_channels: int | None,
) -> Tensor:
    """The model's output under guidance, in the dtype of x.

    Scale 1 is the conditional output alone: the model is then called on the plain batch.

    Args:
        x: (B, C, H, W); labels: (B,) int64; null_label: the class that stands for "no label".
        t: the timestep of the whole batch.
        scale: s; 0 is the output without a label.
        guided_channels: first n channels of C to guide; None: all C.

    Returns:
        (B, C, H, W), or (B, 2C, H, W) if the model has variance channels.
    """
    if scale == 1:
        return model(x, t, labels).to(x.dtype)
    null_labels = torch.full_like(labels, null_label)
    output = model(torch.cat([x, x]), t, torch.cat([labels, null_labels])).to(x.dtype)
    conditional, null = output.chunk(2)
    channels = x.shape[1] if guided_channels is None else min(guided_channels, x.shape[1])
    return guide(conditional, null, scale, channels)
