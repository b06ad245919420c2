"""DiffusionLoss, what an objective returns, and the reading of a model's output channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dydit.errors import ShapeError


@dataclass(frozen=True)
class DiffusionLoss:
    """A training loss per sample; the caller takes the mean.

    Attributes:
        total: (B,), what is minimised.
        mse: (B,), mean squared error of the prediction.
        vb: (B,), the variational bound's term in bits per dimension, before its weight; None where
            no variance is learned.
    """

    total: Tensor
    mse: Tensor
    vb: Tensor | None = None


def split_output(model_output: Tensor, channels: int, learn_sigma: bool) -> tuple[Tensor, Tensor | None]:
    """The prediction, and v where the model has variance channels.

    Args:
        model_output: (B, C, H, W), or (B, 2C, H, W) with ``learn_sigma``.
        channels: C, of the data.
        learn_sigma: whether the model was built with variance channels.

    Raises:
        ShapeError: for another number of channels.
    """
    expected = 2 * channels if learn_sigma else channels
    if model_output.ndim < 2 or model_output.shape[1] != expected:
        raise ShapeError(
            f"model output of shape {tuple(model_output.shape)} for data of {channels} channels",
            expected=f"{expected} channels with learn_sigma={learn_sigma}",
            remedy="build objective and sampler with the learn_sigma of the model",
        )
    if not learn_sigma:
        return model_output, None
    prediction, v = model_output.split(channels, dim=1)
    return prediction, v


def in_full_precision(x: Tensor) -> Tensor:
    """At least float32: a loss summed in half precision loses its small differences."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
