"""Public DyDiT files: a DiT's names with three routers more in every block, in two releases.

The first release has a score for every head and channel group; the second leaves out those of the first head
and group, which are always on.
"""

from __future__ import annotations

from typing import Any

from dydit.errors import CheckpointError
from dydit.models.checkpoints.names import Row
from dydit.models.checkpoints.public_dit import shape_of
from dydit.models.checkpoints.sources import TensorSource

_ROUTERS = "dynamic_blocks.{i}.routers"

# Our DyDiT's names and those of the public files.
TABLE = (
    Row(f"{_ROUTERS}.head_router.{{rest}}", ("blocks.{i}.attn_rate.{rest}",)),
    Row(f"{_ROUTERS}.group_router.{{rest}}", ("blocks.{i}.mlp_rate.{rest}",)),
    Row(f"{_ROUTERS}.token_router.{{rest}}", ("blocks.{i}.token_selection.mlp_head.{rest}",)),
    Row("backbone.{rest}", ("{rest}",)),
)

_HEADS = "blocks.0.attn_rate.router.weight"
_GROUPS = "blocks.0.mlp_rate.router.weight"
_TOKENS = "blocks.0.token_selection.mlp_head.0.weight"


def has_routers(source: TensorSource) -> bool:
    """Whether a public file is a DyDiT's."""
    return any(name in source.facts for name in (_HEADS, _GROUPS, _TOKENS))


def head_candidates(source: TensorSource, hidden_size: int) -> set[int]:
    """Numbers of heads H that the head router's scores, H or H−1 of them, leave possible."""
    scores = _scores(source, _HEADS)
    if scores is None:
        return set()
    return {heads for heads in (scores, scores + 1) if heads and hidden_size % heads == 0}


def infer_routing(source: TensorSource, num_heads: int, hidden_size: int) -> dict[str, Any]:
    """Fields of ``DyDiTConfig`` that the routers of a public file have.

    Raises:
        CheckpointError: their numbers fit neither release.
    """
    heads = _scores(source, _HEADS)
    groups = _scores(source, _GROUPS)
    always_on = _always_on(source, num_heads, groups if heads is None else heads)
    routing: dict[str, Any] = {
        "head_routing": heads is not None,
        "mlp_routing": groups is not None,
        "token_routing": _TOKENS in source.facts,
        "always_on": always_on,
        "rank": "none",  # the file's order of heads and channels is the one its routers know
    }
    if groups is not None and (count := groups + int(always_on)) != num_heads:
        routing["mlp_groups"] = count
    if routing["token_routing"]:
        hidden = shape_of(source, _TOKENS, 2)[0]
        ratio = hidden_size // hidden
        if not ratio or max(1, hidden_size // ratio) != hidden:
            raise CheckpointError(
                f"{source.label}: a token router of {hidden} hidden units",
                expected=f"{hidden_size} over a whole number",
            )
        routing["token_router_ratio"] = ratio
    return routing


def _scores(source: TensorSource, name: str) -> int | None:
    """Scores of a router, None where there is none; 0 where all it could switch is always on."""
    return shape_of(source, name, 2, smallest=0)[0] if name in source.facts else None


def _always_on(source: TensorSource, num_heads: int, scores: int | None) -> bool:
    releases = {num_heads: False, num_heads - 1: True, None: False}
    if scores not in releases:
        raise CheckpointError(
            f"{source.label}: routers with {scores} scores for {num_heads} heads",
            expected=f"{num_heads}, or {num_heads - 1} with an always-on component",
            remedy="pass num_heads if the model has another number of them",
        )
    return releases[scores]
