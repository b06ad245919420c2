"""MACs from shapes and masks alone, exact to the last one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from dydit.compute.table import OUTSIDE, MacTable
from dydit.config import DyDiTConfig
from dydit.costs import BlockCost, block_parts, outer_macs, outer_parts
from dydit.dynamic.compute_loss import deployed_cost, deployed_routers
from dydit.routing.routers import router_shape
from dydit.routing.routing import Routing
from dydit.shapes import ModelShape


def executed_macs(shape: ModelShape, config: DyDiTConfig, routing: Routing) -> Tensor:
    """MACs (B,) int64 that a SubnetEngine executes for each sample under a routing."""
    heads, groups, tokens = (
        gates.long().sum(-1) for gates in (routing.heads, routing.groups, routing.tokens)
    )  # (B, L) each
    return outer_macs(shape) + deployed_cost(shape, config).executed(heads, groups, tokens).sum(-1)


def static_table(shape: ModelShape) -> MacTable:
    """MACs per sample of the static backbone."""
    return _dense_table(shape, block_parts(shape))


def masked_table(shape: ModelShape, config: DyDiTConfig) -> MacTable:
    """MACs per sample of the trained form: masks multiply, so everything runs, and all routers besides."""
    return _dense_table(shape, block_parts(shape, router_shape(shape, config)))


def executed_table(
    shape: ModelShape, config: DyDiTConfig, heads: np.ndarray, groups: np.ndarray, tokens: np.ndarray
) -> MacTable:
    """MACs that a SubnetEngine executes for a whole batch.

    Args:
        heads: active heads (B, L) of each sample and block; groups: active groups; tokens: kept tokens.
    """
    return _table(shape, block_parts(shape, deployed_routers(shape, config)), heads, groups, tokens)


def _dense_table(shape: ModelShape, parts: Mapping[str, BlockCost]) -> MacTable:
    full = (shape.num_heads, shape.mlp_groups, shape.tokens)
    return _table(shape, parts, *(np.full((1, shape.depth), count) for count in full))


def _table(
    shape: ModelShape,
    parts: Mapping[str, BlockCost],
    heads: np.ndarray,
    groups: np.ndarray,
    tokens: np.ndarray,
) -> MacTable:
    batch = len(heads)
    cells = {
        f"block {i}": {
            part: int(np.sum(cost.executed(heads[:, i], groups[:, i], tokens[:, i])))
            for part, cost in parts.items()
        }
        for i in range(shape.depth)
    }
    return MacTable(cells | {OUTSIDE: {part: batch * macs for part, macs in outer_parts(shape).items()}})
