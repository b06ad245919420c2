"""Order heads and groups by use, so that most masks of a schedule are contiguous runs: views, not copies."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dydit.dynamic.dydit import DyDiT
from dydit.dynamic.importance import permute_channels, permute_heads
from dydit.export.schedule import SubnetSchedule, is_one_run
from dydit.routing.routers import WidthRouter


def order_by_use(model: DyDiT, schedule: SubnetSchedule) -> None:
    """Put each block's heads and groups in the order of how many timesteps use them, in place.

    The most used come first, of equal ones the earlier; where fewer masks of a block would then be contiguous
    than are now, its components stay. The model's function does not change, and a second call changes
    nothing. What is always on stays first: every timestep uses it.

    Args:
        model: its weights change, so the schedule has to be read off it again.
        schedule: of this model; its masks (S, L, H) and (S, L, G) tell the use.
    """
    adapter = model.adapter
    heads, groups = schedule.heads, schedule.groups
    for i, (block, routers) in enumerate(zip(adapter.blocks(model.backbone), model.routers, strict=True)):
        head_order, group_order = _most_used_first(heads[:, i]), _most_used_first(groups[:, i])
        permute_heads(adapter.attention(block), head_order)
        permute_channels(adapter.mlp(block), group_order)
        _permute_scores(routers.head_router, head_order)
        _permute_scores(routers.group_router, group_order)


def _most_used_first(masks: np.ndarray) -> Tensor:
    """Order (K,) of the components of masks (S, K); that which they have if more masks are one run in it."""
    order = torch.from_numpy(masks.sum(0)).argsort(descending=True, stable=True)
    fewer = is_one_run(masks[:, order.numpy()]).sum() < is_one_run(masks).sum()
    return torch.arange(len(order)) if fewer else order


@torch.no_grad()
def _permute_scores(router: WidthRouter | None, order: Tensor) -> None:
    """Reorder a router's scores in place; the component that is always on has none, and stays first."""
    if router is None:
        return
    rows = order[1:] - 1 if router.always_on else order
    for tensor in (router.router.weight, router.router.bias):
        tensor.copy_(tensor[rows])
