"""The compute that a routing executes, as a differentiable share of the static backbone's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dydit.config import DyDiTConfig
from dydit.costs import BlockCost, RouterShape, block_cost, outer_macs, static_macs
from dydit.routing.routers import router_shape
from dydit.routing.routing import Routing
from dydit.shapes import ModelShape

MeanOverRanks = Callable[[Tensor], Tensor]


def deployed_routers(shape: ModelShape, config: DyDiTConfig) -> RouterShape:
    """The routers that run when deployed: the width is known beforehand, so only the token router does."""
    return RouterShape(token_hidden=router_shape(shape, config).token_hidden)


def deployed_cost(shape: ModelShape, config: DyDiTConfig) -> BlockCost:
    """Cost of one deployed block."""
    return block_cost(shape, deployed_routers(shape, config))


def compute_ratio(shape: ModelShape, config: DyDiTConfig, routing: Routing) -> Tensor:
    """Executed over static MACs of each sample, (B,), differentiable in the gates.

    Counts what the engine executes: embeddings and decoder, active heads, active groups × kept tokens, and
    the token routers. (DyDiT's compute loss, with the constants of the model at hand.)
    """
    cost = deployed_cost(shape, config)
    # float32 keeps the share exact to 1e-7 under autocast, where the gates may be bf16.
    per_block = cost.executed(
        routing.heads.float().sum(-1), routing.groups.float().sum(-1), routing.tokens.float().sum(-1)
    )  # (B, L)
    return (outer_macs(shape) + per_block.sum(-1)) / static_macs(shape)


def minimum_ratio(shape: ModelShape, config: DyDiTConfig) -> float:
    """Lowest share that routing can reach: the always-on components alone, no token kept."""
    cost = deployed_cost(shape, config)
    spared = int(config.always_on)
    heads = spared if config.head_routing else shape.num_heads
    groups = spared if config.mlp_routing else shape.mlp_groups
    tokens = 0 if config.token_routing else shape.tokens
    return (outer_macs(shape) + shape.depth * cost.executed(heads, groups, tokens)) / static_macs(shape)


def compute_loss(ratio: Tensor, target: float) -> Tensor:
    """(mean ratio − target)², a scalar.

    The mean is over the samples given, before the square. Where several processes share a batch, give it
    their ``pooled_mean``: the mean of each rank's own square is another loss.
    """
    return (ratio.mean() - target) ** 2


def pooled_mean(values: Tensor, mean_over_ranks: MeanOverRanks) -> Tensor:
    """Mean of ``values`` over the batches of all processes, with the gradient that averaging needs.

    The value is the mean over all ranks (squaring each rank's own mean would be another loss); the gradient
    is this rank's, d mean(values). DDP and FSDP then average gradients over ranks, so for L = (m − λ)² they
    arrive at (1/W) Σ_r 2 (m − λ) dm_r = dL: exact with equal batches, and no collective in the backward.

    Args:
        values: (B,) of this process.
        mean_over_ranks: a detached scalar -> its mean over all processes, such as
            ``lambda m: accelerator.reduce(m, "mean")``.
    """
    local = values.mean()
    # local + 0 in the value, so that one process alone gets its own mean to the bit
    return local + (mean_over_ranks(local.detach()) - local.detach())


def ramped_target(step: int, target: float, ramp_steps: int) -> float:
    """The target at a step: from 1 down to ``target`` linearly over ``ramp_steps``."""
    progress = 1.0 if ramp_steps <= 0 else min(1.0, step / ramp_steps)
    return (1.0 - progress) + progress * target
