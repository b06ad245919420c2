"""Classifier-free guidance (Ho & Salimans): one call of a model on a doubled batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dydit.errors import ConfigError, ShapeError

# A model as it is sampled from: x (B, C, H, W), t (B,) or one number for the whole batch, y (B,) int64.
Denoiser = Callable[[Tensor, Any, Tensor], Tensor]


class LabelledModel(Protocol):
    """A denoiser that knows its null class."""

    @property
    def null_label(self) -> int | Tensor | None: ...

    def __call__(self, x: Tensor, t: Any, y: Tensor) -> Any: ...


def guide(conditional: Tensor, null: Tensor, scale: float, guided_channels: int) -> Tensor:
    """null + s·(conditional − null) on the first channels, conditional on the others. (B, C', H, W)

    With s = 1 + w this is eq. 6 of Ho & Salimans. Published DiT samples guide three channels of
    four; variance channels come last and are never guided.
    """
    first_conditional, first_null = conditional[:, :guided_channels], null[:, :guided_channels]
    guided = first_null + scale * (first_conditional - first_null)
    return torch.cat([guided, conditional[:, guided_channels:]], dim=1)


def with_null(labels: Tensor, null: Tensor | int) -> Tensor:
    """Labels (B,) or texts (B, M, context_dim), and as many of what stands for none: (2B, ...).

    Raises:
        ShapeError: ``null`` is of another shape than a text.
    """
    if isinstance(null, Tensor) and null.shape not in (labels.shape, labels.shape[1:]):
        raise ShapeError(
            f"{tuple(null.shape)} in the place of texts {tuple(labels.shape)} for guidance",
            expected="the shape of them or of one of them",
            remedy="give texts of that many tokens, or null_y of as many as the texts",
        )
    without = null.expand_as(labels) if isinstance(null, Tensor) else torch.full_like(labels, null)
    return torch.cat([labels, without])


def batch_labels(labels: Tensor, null: Tensor | int | None, scale: float) -> Tensor:
    """What guidance at a scale gives the model: labels, and what stands for none (see ``with_null``).

    Raises:
        ConfigError: the model has no null class.
    """
    if scale == 1:
        return labels
    if null is None:
        raise ConfigError(f"guidance scale {scale:g} for a model without a null class", expected="scale 1")
    return with_null(labels, null)


def for_run(model: Denoiser, timesteps: Sequence[float], y: Tensor) -> Denoiser:
    """A model for one sampling run, whose calls are known: what its ``for_run`` gives, where it has one."""
    prepare = getattr(model, "for_run", None)
    return model if prepare is None else prepare(timesteps, y)


def guided_output(
    model: Denoiser,
    x: Tensor,
    t: Tensor | float,
    labels: Tensor,
    null: Tensor | int | None,
    *,
    scale: float,
    guided_channels: int | None,
) -> Tensor:
    """The model's output under guidance, in the dtype of x.

    Scale 1 is the conditional output alone: the model is then called on the plain batch.

    Args:
        x: (B, C, H, W).
        t: the timestep of the whole batch, or one per sample (B,).
        labels: (B,) int64, or text tokens (B, M, context_dim).
        null: the class that stands for "no label"; or, with the shape of ``labels`` or of one of them, what
            takes their place; None where the model has neither.
        scale: s; 0 is, in the guided channels, the output without a label.
        guided_channels: first n channels of C to guide; None: all C.

    Returns:
        (B, C, H, W), or (B, 2C, H, W) if the model has variance channels.

    Raises:
        ConfigError: guided_channels is below 1, or the model has no null class.
    """
    if guided_channels is not None and guided_channels < 1:
        raise ConfigError(f"guided_channels is {guided_channels}", expected="at least 1, or None for all")
    given = batch_labels(labels, null, scale)
    if scale == 1:
        return model(x, t, given).to(x.dtype)
    steps = torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t
    output = model(torch.cat([x, x]), steps, given).to(x.dtype)
    conditional, without = output.chunk(2)
    channels = x.shape[1] if guided_channels is None else min(guided_channels, x.shape[1])
    return guide(conditional, without, scale, channels)


def forward_with_cfg(
    self: LabelledModel,
    x: Tensor,
    t: Tensor | float,
    y: Tensor,
    guidance_scale: float,
    guided_channels: int | None = 3,
    *,
    null_y: Tensor | None = None,
) -> Tensor:
    """The prediction under classifier-free guidance, by one call on the doubled batch; a model's method.

    The batch is given once, with its labels: the half without labels is made here, and not made at scale 1.

    Args:
        x: latents (B, C, height, width).
        t: timesteps (B,), or one number for the whole batch.
        y: labels (B,), or text tokens (B, M, context_dim).
        guidance_scale: s in null + s·(conditional − null); 1 is the conditional prediction.
        guided_channels: first n latent channels to guide (public DiT samples: 3); None: all. The others, and
            the variance channels, are the conditional prediction's.
        null_y: what y is without a label; None: the model's ``null_label``.

    Returns:
        (B, C, height, width), or (B, 2C, height, width) if the covariance is learned.

    Raises:
        ConfigError: guided_channels is below 1, or the model has no null class.
        ShapeError: x, t or y does not fit.
    """
    null = self.null_label if null_y is None else null_y
    return guided_output(self, x, t, y, null, scale=guidance_scale, guided_channels=guided_channels)
