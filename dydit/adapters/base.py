"""What an architecture must tell so that it can be made dynamic: facts and a few verbs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from dydit.models.blocks import Conditioning, Modulation
from dydit.shapes import ModelShape


@dataclass(frozen=True)
class AttentionParts:
    """The linear layers of one block's self-attention.

    Attributes:
        qkv: one fused layer (rows: q, k, v, each head after head) or three layers q, k, v.
        out: the output projection.
        num_heads: H.
    """

    qkv: tuple[nn.Linear, ...]
    out: nn.Linear
    num_heads: int


@dataclass(frozen=True)
class MlpParts:
    """The layers of one block's MLP; ``act(0)`` must be 0, so that masking equals slicing."""

    fc1: nn.Linear
    act: Callable[[Tensor], Tensor]
    fc2: nn.Linear


class Adapter(Protocol):
    """One architecture. Stateless: every verb takes the model or block it speaks of."""

    @property
    def layer_parts(self) -> Mapping[str, str]:
        """Name of a layer in the model -> the part of the compute that it is (``dydit.costs.PARTS``).

        Of nested layers the outer one's row counts. Attention's products and the blocks' norms need no row.
        """

    def shape(self, model: Any) -> ModelShape:
        """The model's numbers."""

    def blocks(self, model: Any) -> nn.ModuleList:
        """The transformer blocks in order."""

    def timestep_embedding(self, model: Any, t: Tensor) -> Tensor:
        """Timesteps (S,) -> the embedding (S, D) that ``condition`` gives the width routers."""

    def condition(self, model: Any, t: Tensor, y: Tensor) -> Conditioning:
        """Timesteps (B,) and labels or texts -> what the blocks are conditioned on."""

    def embed(self, model: Any, x: Tensor, cond: Conditioning) -> Tensor:
        """Latents (B, C, height, width) -> tokens (B, N, D)."""

    def decode(self, model: Any, tokens: Tensor, cond: Conditioning) -> Tensor:
        """Tokens (B, N, D) -> prediction (B, C_out, height, width)."""

    def modulation(self, block: Any, cond: Conditioning) -> Modulation:
        """Shift, scale and gate of a block's two branches."""

    def modulations(self, blocks: Sequence[Any], cond: Conditioning) -> list[Modulation]:
        """``modulation(block, cond).for_tokens()`` of several blocks, without gradients."""

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        """The layer norms before attention and before the MLP."""

    def attention(self, block: Any) -> AttentionParts:
        """The block's self-attention."""

    def cross(self, block: Any, tokens: Tensor, cond: Conditioning) -> Tensor:
        """What happens between self-attention and MLP (cross-attention on its residual, or nothing)."""

    def mlp(self, block: Any) -> MlpParts:
        """The block's MLP."""
