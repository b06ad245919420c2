"""Number formats: their short names, and parts that autocast leaves in the weights' own."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Network = TypeVar("_Network", bound=nn.Module)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast is off on the device of ``like``; nothing at all where it is off already.

    For the timestep embedding and the routers. Their decisions are hard: a logit of 15 in bfloat16 has steps
    of 1/16, and a model trained under autocast would be deployed, without it, with other subnetworks.
    """
    kind = like.device.type
    # There is no autocast on "meta", where networks are counted without computing.
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def converted_copy(model: _Network, dtype: torch.dtype) -> _Network:
    """A copy with floating-point weights and buffers in ``dtype``; no copy is made in the old dtype."""
    copies: dict[int, Any] = {}  # what deepcopy takes in the place of a tensor with that id
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != dtype:
            new = tensor.detach().to(dtype)
            is_weight = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_weight else new
    return copy.deepcopy(model, copies)
