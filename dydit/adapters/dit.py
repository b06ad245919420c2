"""The project's own ``DiT``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dydit.adapters.base import AttentionParts, MlpParts
from dydit.models.blocks import Block, Conditioning, Modulation, modulations
from dydit.models.dit import LAYER_PARTS, DiT
from dydit.shapes import ModelShape


class DiTAdapter:
    """Facts of ``dydit.models.dit.DiT``, every conditioning design."""

    layer_parts = LAYER_PARTS

    def shape(self, model: DiT) -> ModelShape:
        return model.shape

    def blocks(self, model: DiT) -> nn.ModuleList:
        return model.blocks

    def timestep_embedding(self, model: DiT, t: Tensor) -> Tensor:
        return model.t_embedder(t)

    def condition(self, model: DiT, t: Tensor, y: Tensor) -> Conditioning:
        return model.condition(t, y)

    def embed(self, model: DiT, x: Tensor, cond: Conditioning) -> Tensor:
        return model.embed(x, cond)

    def decode(self, model: DiT, tokens: Tensor, cond: Conditioning) -> Tensor:
        return model.decode(tokens, cond)

    def modulation(self, block: Block, cond: Conditioning) -> Modulation:
        return block.modulation(cond)

    def modulations(self, blocks: Sequence[Block], cond: Conditioning) -> list[Modulation]:
        return modulations(blocks, cond)

    def norms(self, block: Block) -> tuple[nn.Module, nn.Module]:
        return block.norm1, block.norm2

    def attention(self, block: Block) -> AttentionParts:
        return AttentionParts((block.attn.qkv,), block.attn.proj, block.attn.num_heads)

    def cross(self, block: Block, tokens: Tensor, cond: Conditioning) -> Tensor:
        return block.cross(tokens, cond)

    def mlp(self, block: Block) -> MlpParts:
        return MlpParts(block.mlp.fc1, block.mlp.act, block.mlp.fc2)
