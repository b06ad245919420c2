"""Where a non-finite step came from, looked for only once there is one."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

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
    found = routing.logits and _first_nan(routing.logits)
    return next((name for name in gather_object([found or ""]) if name), "")


def _first_nan(logits: Any) -> str:
    # In the order of a forward: all widths are decided before the first block, then block by block.
    kinds = {"head_router": logits.heads, "group_router": logits.groups}
    for i in range(logits.heads.shape[1]):
        for kind, values in kinds.items():
            if _has_nan(values[:, i]):
                return f"dynamic_blocks.{i}.routers.{kind}"
    for i in range(logits.tokens.shape[1]):
        if _has_nan(logits.tokens[:, i]):
            return f"dynamic_blocks.{i}.routers.token_router"
    return ""


def _has_nan(values: Tensor) -> bool:
    return bool(values.isnan().any())
