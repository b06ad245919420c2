"""The width routers' logits at a sampler's timesteps, and the refusal of logits that are no numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dydit.dynamic.dydit import DyDiT
from dydit.errors import ScheduleError
from dydit.routing.routing import first_nan


@torch.no_grad()
def timestep_logits(model: DyDiT, timesteps: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Head logits (S, L, H) and group logits (S, L, G) at timesteps (S,).

    Raises:
        ScheduleError: a router gives NaN; names it and its block.
    """
    device = next(model.parameters()).device
    embedding = model.adapter.timestep_embedding(model.backbone, torch.tensor(timesteps, device=device))
    heads, groups = model.width_logits(embedding)
    check_numbers({"head_router": heads, "group_router": groups})
    return heads, groups


def check_numbers(logits: Mapping[str, Tensor]) -> None:
    """Refuse NaN in the logits (…, L, K) of each kind of router: a threshold would take it for closed.

    Raises:
        ScheduleError: names the first such router and its block.
    """
    if broken := first_nan(logits):
        raise ScheduleError(
            f"the logits of router {broken} are NaN",
            expected="numbers",
            remedy="export an earlier checkpoint",
        )
