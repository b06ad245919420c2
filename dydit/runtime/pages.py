"""Memory straight from the system, for slices: they stay while the results of products come and go.

In the C library's heap, slices lie between gaps that results of other sizes do not fit in: these then lie
further apart, and a sampling run takes some percent longer.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

LARGE = 1 << 20  # bytes; of smaller tensors too much of the last page would be lost


def lasting(like: Tensor, *shape: int) -> Tensor:
    """A tensor of a dtype and device, not initialised: on the CPU, where it is large, in pages of its own."""
    size = math.prod(shape) * like.itemsize
    if like.device.type != "cpu" or size < LARGE or not hasattr(mmap, "MAP_PRIVATE"):  # as on Windows
        return like.new_empty(shape)
    try:  # private: a forked process writes to pages of its own, as with any other tensor
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # more ranges than the system allows; or no memory, which PyTorch tells
        return like.new_empty(shape)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)
