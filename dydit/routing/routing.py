"""What was decided in one forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dydit.errors import ShapeError
from dydit.shapes import ModelShape


@dataclass(frozen=True)
class RoutingLogits:
    """What the gates of one forward were decided on; a gate's score is the sigmoid of its logit.

    Attributes:
        heads: (B, L, H), +inf where always on.
        groups: (B, L, G), +inf where always on.
        tokens: (B, L, N), +inf without a token router.
    """

    heads: Tensor
    groups: Tensor
    tokens: Tensor

    def first_nan(self) -> str:
        """Name of the first router that gave NaN, in the order of a forward; empty if none did.

        NaN is no decision, and a thresholded gate takes it for closed. Waits for the device.
        """
        # All widths are decided before the first block, tokens block by block.
        width = first_nan({"head_router": self.heads, "group_router": self.groups})
        return width or first_nan({"token_router": self.tokens})


def first_nan(logits: Mapping[str, Tensor]) -> str:
    """Name of the first router whose logits (…, L, K) hold NaN, block by block; empty if none do.

    Args:
        logits: kind of router -> its logits in all blocks.
    """
    broken = {kind: values.isnan().any(-1).flatten(0, -2).any(0).tolist() for kind, values in logits.items()}
    depth = max(map(len, broken.values()))
    found = [(block, kind) for block in range(depth) for kind in broken if broken[kind][block]]
    return f"dynamic_blocks.{found[0][0]}.routers.{found[0][1]}" if found else ""


@dataclass(frozen=True)
class Routing:
    """Gates of one forward, 1 = runs, 0 = does not (floats, so that gradients can pass).

    Attributes:
        heads: attention heads (B, L, H).
        groups: MLP channel groups (B, L, G).
        tokens: tokens that enter the MLP (B, L, N).
        logits: the routers' logits behind the gates; None where no router ran.
    """

    heads: Tensor
    groups: Tensor
    tokens: Tensor
    logits: RoutingLogits | None = None

    @classmethod
    def complete(cls, shape: ModelShape, batch: int, like: Tensor) -> Routing:
        """Everything on, with the dtype and device of ``like``."""

        def ones(width: int) -> Tensor:
            return torch.ones(batch, shape.depth, width, dtype=like.dtype, device=like.device)

        return cls(ones(shape.num_heads), ones(shape.mlp_groups), ones(shape.tokens))

    def check(self, shape: ModelShape, batch: int) -> None:
        """Refuse gates that are not of the model's shape.

        Raises:
            ShapeError: names the gates that do not fit.
        """
        widths = {"heads": shape.num_heads, "groups": shape.mlp_groups, "tokens": shape.tokens}
        for name, width in widths.items():
            seen, expected = tuple(getattr(self, name).shape), (batch, shape.depth, width)
            if seen != expected:
                raise ShapeError(f"routing.{name} of shape {seen}", expected=str(expected))
