"""Closed-form compute of a DiT and of its subnetworks, in MACs (1 MAC = 1 multiply-add = 2 FLOPs).

The conventions are fvcore's, so that counted and analytic figures agree to the last MAC: a linear layer
counts in × out per token, attention counts its two matrix products, a layer norm counts 4 per element
(5 with an affine part); activations, softmax and other elementwise work count nothing.

Every formula belongs to one part of the network (``PARTS``), and every total is a sum of parts. Within a
block they are polynomials in the number of active heads, active groups and kept tokens, so the same functions
take Python integers (reports), arrays (schedules) and tensors (the compute loss).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from dydit.shapes import FREQUENCY_SIZE, ModelShape

NORM_MACS = 4  # fvcore's count per element of a layer norm without affine part
AFFINE_NORM_MACS = 5

# The parts of a network, in the order of the tables.
PATCH_EMBEDDING = "patch embedding"
CONDITIONING = "conditioning"  # embedding of timestep and label or text, and what the blocks regress from it
ATTENTION_PROJECTIONS = "attention projections"  # query, key, value and output; of cross-attention too
ATTENTION_PRODUCTS = "attention products"  # query·keyᵀ and weights·value; of cross-attention too
MLP = "MLP"
NORMS = "norms"  # layer norms of the blocks
ROUTERS = "routers"
DECODER = "decoder"  # final layer norm, its modulation, and the projection to pixels
PARTS = (
    PATCH_EMBEDDING,
    CONDITIONING,
    ATTENTION_PROJECTIONS,
    ATTENTION_PRODUCTS,
    MLP,
    NORMS,
    ROUTERS,
    DECODER,
)

# Rows of D that a block regresses from the conditioning vector: shift, scale (and gate), twice.
MODULATION_ROWS = {"adaln": 4, "adaln_zero": 6}


@dataclass(frozen=True)
class RouterShape:
    """Outputs and widths of one block's routers; 0 where a router is absent.

    Args:
        head_scores: scores of the head router (H, or H−1 with an always-on head).
        group_scores: scores of the MLP group router.
        token_hidden: hidden units of the token router.
    """

    head_scores: int = 0
    group_scores: int = 0
    token_hidden: int = 0


@dataclass(frozen=True)
class BlockCost:
    """MACs of one block, or of a part of it, for one sample, as a polynomial in what is active.

    ``executed(h, g, k) = fixed + per_head·h + per_token·k + per_token_group·g·k``, where a sample without a
    kept token runs no part of the MLP.
    """

    fixed: int = 0
    per_head: int = 0
    per_token: int = 0
    per_token_group: int = 0

    def executed(self, heads: Any, groups: Any, tokens: Any) -> Any:
        """MACs with ``heads`` active heads, ``groups`` active groups and ``tokens`` kept tokens."""
        return (
            self.fixed
            + self.per_head * heads
            + self.per_token * tokens
            + self.per_token_group * groups * tokens
        )

    def __add__(self, other: BlockCost) -> BlockCost:
        return BlockCost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def block_parts(shape: ModelShape, routers: RouterShape | None = None) -> dict[str, BlockCost]:
    """Cost of each part of one block; with ``routers`` their own MACs are the part ``ROUTERS``."""
    N, D, M = shape.tokens, shape.hidden_size, context_tokens(shape)
    routers = routers or RouterShape()
    return {
        CONDITIONING: BlockCost(fixed=_block_conditioning_macs(shape)),
        ATTENTION_PROJECTIONS: BlockCost(
            # Cross-attention: query and output of N tokens, key and value of M.
            fixed=2 * (N + M) * D * D if M else 0,
            per_head=4 * N * D * shape.head_dim,
        ),
        ATTENTION_PRODUCTS: BlockCost(fixed=2 * N * M * D, per_head=2 * N * N * shape.head_dim),
        MLP: BlockCost(per_token_group=2 * D * shape.group_size),
        # The norm before attention (and the one before cross-attention) sees every token.
        NORMS: BlockCost(
            fixed=norm_macs(shape) * N * D * (2 if shape.conditioning == "cross_attention" else 1),
            per_token=norm_macs(shape) * D,
        ),
        ROUTERS: BlockCost(
            fixed=D * (routers.head_scores + routers.group_scores) + N * routers.token_hidden * (D + 1)
        ),
    }


def block_cost(shape: ModelShape, routers: RouterShape | None = None) -> BlockCost:
    """Cost of one block; with ``routers`` their own MACs are part of ``fixed``."""
    return sum(block_parts(shape, routers).values(), start=BlockCost())


def outer_parts(shape: ModelShape) -> dict[str, int]:
    """MACs per sample of each part outside the blocks."""
    return {
        PATCH_EMBEDDING: patch_embedding_macs(shape),
        CONDITIONING: embedding_macs(shape),
        DECODER: decoder_macs(shape),
    }


def outer_macs(shape: ModelShape) -> int:
    """MACs per sample outside the blocks: patch embedding, conditioning and decoder."""
    return sum(outer_parts(shape).values())


def static_macs(shape: ModelShape) -> int:
    """MACs per sample of the static backbone: every head, group and token, no routers."""
    full = block_cost(shape).executed(shape.num_heads, shape.mlp_groups, shape.tokens)
    return outer_macs(shape) + shape.depth * full


def context_tokens(shape: ModelShape) -> int:
    """Tokens M that a block's cross-attention reads (timestep and label, or the text's); 0 without one."""
    return {"cross_attention": 2, "adaln_single": shape.context_length}.get(shape.conditioning, 0)


def norm_macs(shape: ModelShape) -> int:
    """MACs per element of a block's layer norm."""
    return AFFINE_NORM_MACS if has_affine_norms(shape.conditioning) else NORM_MACS


def has_affine_norms(conditioning: str) -> bool:
    """Whether the layer norms carry their own scale and shift (no design regresses them)."""
    return conditioning in ("in_context", "cross_attention")


def patch_embedding_macs(shape: ModelShape) -> int:
    """MACs of the linear embedding of the patches."""
    rows, columns = shape.grid
    return rows * columns * shape.hidden_size * shape.in_channels * shape.patch_size**2


def embedding_macs(shape: ModelShape) -> int:
    """MACs of the timestep MLP and, with text, of the shared modulation and the caption projection."""
    D = shape.hidden_size
    macs = timestep_macs(shape)
    if shape.conditioning == "adaln_single":
        macs += 6 * D * D + shape.context_length * (shape.context_dim * D + D * D)
    return macs


def timestep_macs(shape: ModelShape) -> int:
    """MACs of one timestep MLP."""
    return (FREQUENCY_SIZE + shape.hidden_size) * shape.hidden_size


def decoder_macs(shape: ModelShape) -> int:
    """MACs of the final norm, its modulation and the projection to pixels."""
    D = shape.hidden_size
    patches = shape.tokens - shape.extra_tokens
    modulation = 2 * D * D if shape.conditioning in MODULATION_ROWS else 0
    return patches * D * (norm_macs(shape) + shape.out_channels * shape.patch_size**2) + modulation


def _block_conditioning_macs(shape: ModelShape) -> int:
    own_embedding = timestep_macs(shape) if shape.embeds_per_block else 0
    return own_embedding + MODULATION_ROWS.get(shape.conditioning, 0) * shape.hidden_size**2
