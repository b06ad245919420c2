"""One call of an engine, counted and by closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
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
    with record_token_logits(engine) as logits:
        counted = count_macs(engine, x, t, y)
    kept = kept_tokens(engine, t, len(x), logits)
    return EngineCall(counted, engine_table(engine, t, kept), kept)


@contextmanager
def record_token_logits(engine: SubnetEngine) -> Iterator[dict[int, Tensor]]:
    """Block -> its token router's logits (B, N) in the last call within the context."""
    logits: dict[int, Tensor] = {}
    blocks: Any = engine.blocks
    with ExitStack() as stack:
        for i, block in enumerate(blocks):
            stack.enter_context(block.listening(partial(logits.__setitem__, i)))
        yield logits


def kept_tokens(engine: SubnetEngine, t: float, rows: int, logits: Mapping[int, Tensor]) -> np.ndarray:
    """Tokens (B, L) that entered the MLP in a call of ``rows`` samples at timestep ``t``.

    Args:
        logits: of the token routers in that call; not looked at where the schedule fixes the number.

    Raises:
        ScheduleError: the timestep is not in the schedule.
    """
    shape, schedule = engine.shape, engine.schedule
    if engine.mode == "capacity" and schedule.capacities is not None:
        capacities = schedule.capacities[schedule.index_of(t)]
        return np.broadcast_to(capacities.astype(int), (rows, shape.depth))
    kept = np.full((rows, shape.depth), shape.tokens)
    threshold = logit(schedule.routing.token_threshold)
    for i, scores in logits.items():
        kept[:, i] = torch.count_nonzero(scores.view(rows, -1) > threshold, dim=1).cpu()
    return kept


def engine_table(engine: SubnetEngine, t: float, kept: np.ndarray) -> MacTable:
    """MACs by closed form of a call at timestep ``t`` in which ``kept`` (B, L) tokens entered the MLP.

    What the engine computes to fill up a block's batch (``SubnetEngine.computed_tokens``) is put down to the
    last sample.

    Raises:
        ScheduleError: the timestep is not in the schedule.
    """
    schedule = engine.schedule
    position = schedule.index_of(t)
    heads, groups = (
        np.broadcast_to(masks[position].sum(-1), kept.shape) for masks in (schedule.heads, schedule.groups)
    )
    computed, most = kept.copy(), len(kept) * engine.shape.tokens
    for i, total in enumerate(kept.sum(0).tolist()):
        if 0 < total < most:  # all tokens, or none, are not gathered
            computed[-1, i] += engine.computed_tokens(total) - total
    return executed_table(engine.shape, schedule.routing, heads, groups, computed)
