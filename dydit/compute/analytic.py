"""MACs from masks alone, exact to the last one."""

from __future__ import annotations

from torch import Tensor

from dydit.config import DyDiTConfig
from dydit.costs import outer_macs
from dydit.dynamic.compute_loss import deployed_cost
from dydit.routing.routing import Routing
from dydit.shapes import ModelShape


def executed_macs(shape: ModelShape, config: DyDiTConfig, routing: Routing) -> Tensor:
    """MACs (B,) int64 that a SubnetEngine executes for each sample under a routing."""
    heads, groups, tokens = (
        gates.long().sum(-1) for gates in (routing.heads, routing.groups, routing.tokens)
    )  # (B, L) each
    return outer_macs(shape) + deployed_cost(shape, config).executed(heads, groups, tokens).sum(-1)
