"""What an engine and its subnetworks refuse to run on."""

from __future__ import annotations

import torch
from torch import Tensor

from dydit.errors import ShapeError
from dydit.models.dit import check_latent
from dydit.shapes import ModelShape


def check_inputs(x: Tensor, y: Tensor, shape: ModelShape, weight: Tensor) -> None:
    """Refuse latents x and labels or texts y that a model cannot take.

    Args:
        weight: of the model, which lies on its device and has its dtype.

    Raises:
        ShapeError: no sample, or one of another shape, dtype or device.
    """
    check_latent(x, shape)
    dtype = weight.dtype
    if {x.device, y.device} != {weight.device}:
        seen = f"latents on {x.device}, {'texts' if shape.takes_text else 'labels'} on {y.device}"
        raise ShapeError(seen, expected=f"both on {weight.device}", remedy="move them with .to(device)")
    if not len(x):
        raise ShapeError("a batch without samples", expected="one at least", remedy="leave the call out")
    if x.dtype != dtype:
        raise ShapeError(f"latent of {x.dtype}", expected=str(dtype), remedy="convert it with .to(dtype)")
    if shape.takes_text and y.dtype != dtype:
        raise ShapeError(f"text of {y.dtype}", expected=str(dtype), remedy="convert it with .to(dtype)")
    if not shape.takes_text and y.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"labels of {y.dtype}", expected="int64 or int32", remedy="use .long()")
