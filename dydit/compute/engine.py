"""One call of an engine, counted and by closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dydit.compute.analytic import executed_table
from dydit.compute.counting import MacReport, count_macs
from dydit.compute.table import MacTable
from dydit.routing.gates import logit

if TYPE_CHECKING:
    from dydit.runtime.engine import SubnetEngine


@dataclass(frozen=True)
class EngineCall:
    """Compute of one call of an engine.

    Attributes:
        counted: by fvcore.
        analytic: by closed form, from the schedule's widths and the tokens that this call kept.
        kept_tokens: tokens that entered the MLP (B, L).
    """

    counted: MacReport
    analytic: MacTable
    kept_tokens: np.ndarray


def count_engine(engine: SubnetEngine, x: Tensor, t: float, y: Tensor) -> EngineCall:
    """Run ``engine(x, t, y)`` once, with one timestep for the whole batch.

    Raises:
        ScheduleError: the timestep is not in the schedule.
    """
    shape, schedule = engine.shape, engine.schedule
    position = schedule.index_of(t)
    kept = np.full((len(x), shape.depth), shape.tokens)
    logits: dict[int, Tensor] = {}  # of each block's token router

    def recorder(block: int) -> Any:
        def record(_module: Any, _inputs: Any, output: Tensor) -> None:
            logits[block] = output

        return record

    routers = ((i, r.token_router) for i, r in enumerate(engine.model.routers))
    hooks = [router.register_forward_hook(recorder(i)) for i, router in routers if router is not None]
    try:
        counted = count_macs(engine, x, t, y)
    finally:
        for hook in hooks:
            hook.remove()
    for i, scores in logits.items():
        keep = scores.view(len(x), -1) > logit(schedule.routing.token_threshold)
        kept[:, i] = torch.count_nonzero(keep, dim=1).cpu()
    heads, groups = (
        np.broadcast_to(masks[position].sum(-1), kept.shape) for masks in (schedule.heads, schedule.groups)
    )
    return EngineCall(counted, executed_table(shape, schedule.routing, heads, groups, kept), kept)
