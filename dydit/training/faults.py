"""Where a non-finite step came from, looked for only once there is one."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object

from dydit.routing.routing import RoutingLogits
from dydit.training.batch import NoisyBatch


@torch.no_grad()
def faulty_router(model: Any, batch: NoisyBatch | None) -> str:
    """Name of the first router whose logits are NaN on ``batch``, over all processes; empty if none is.

    Repeats the forward and waits for the device, which is why a good step never calls it. A collective.

    Args:
        model: a DyDiT, possibly wrapped.
        batch: the last batch.
    """
    if batch is None:
        return ""
    _, routing = model(batch.x_t, batch.t, batch.y, return_routing=True, noise=batch.gates)
    return over_processes(routing.logits)


def over_processes(logits: RoutingLogits | None) -> str:
    """``first_nan`` of the first process that has one. A collective."""
    found = "" if logits is None else logits.first_nan()
    return next((name for name in gather_object([found]) if name), "")
