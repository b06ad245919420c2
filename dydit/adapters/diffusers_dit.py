"""diffusers' ``DiTTransformer2DModel``.

Every block of that model embeds timestep and label with weights of its own, and so do these verbs: the copies
of a published checkpoint are equal, but nothing keeps them so in training. The final layer uses block 0's.
Labels are never dropped here, also in training mode: that is the data's part, and the same for every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from dydit.adapters.base import AttentionParts, MlpParts
from dydit.costs import ATTENTION_PROJECTIONS, CONDITIONING, DECODER, MLP, PATCH_EMBEDDING
from dydit.errors import ShapeError
from dydit.models.blocks import Conditioning, Modulation, modulate
from dydit.models.dit import check_latent
from dydit.models.embeddings import check_labels, check_per_sample
from dydit.precision import without_autocast
from dydit.shapes import ModelShape

# Settings that the masked and the sliced block compute; diffusers' class has others.
_SUPPORTED = {
    "activation_fn": ("gelu-approximate", "gelu"),
    "norm_elementwise_affine": (False,),
    "dropout": (0.0,),
}


@dataclass(frozen=True)
class PerBlockConditioning(Conditioning):
    """Conditioning that every block embeds itself.

    Attributes:
        sinusoid: of the timesteps (B, 256).
        labels: (B,).
    """

    sinusoid: Tensor | None = None
    labels: Tensor | None = None


class DiffusersDiTAdapter:
    """Facts of diffusers' ``DiTTransformer2DModel``."""

    layer_parts = {
        "pos_embed": PATCH_EMBEDDING,
        "norm1": CONDITIONING,  # a block's embedder of timestep and label, and its modulation
        "attn1": ATTENTION_PROJECTIONS,
        "ff": MLP,
        "norm_out": DECODER,
        "proj_out_1": DECODER,
        "proj_out_2": DECODER,
    }

    def shape(self, model: DiTTransformer2DModel) -> ModelShape:
        config = model.config
        for name, supported in _SUPPORTED.items():
            if config[name] not in supported:
                raise ShapeError(f"{name} is {config[name]!r}", expected=" or ".join(map(repr, supported)))
        return ModelShape(
            sample_size=(config.sample_size, config.sample_size),
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            out_channels=model.out_channels,
            hidden_size=model.inner_dim,
            depth=config.num_layers,
            num_heads=config.num_attention_heads,
            mlp_hidden=self.mlp(model.transformer_blocks[0]).fc1.out_features,
            mlp_groups=config.num_attention_heads,
            num_classes=config.num_embeds_ada_norm,
            embeds_per_block=True,
        )

    def blocks(self, model: DiTTransformer2DModel) -> nn.ModuleList:
        return model.transformer_blocks

    def timestep_embedding(self, model: DiTTransformer2DModel, t: Tensor) -> Tensor:
        return _timestep(_embedder(model), _sinusoid(model, t))

    def condition(self, model: DiTTransformer2DModel, t: Tensor, y: Tensor) -> Conditioning:
        check_per_sample("labels", y, t.shape[0])
        check_labels(y, model.config.num_embeds_ada_norm)
        sinusoid = _sinusoid(model, t)
        timestep = _timestep(_embedder(model), sinusoid)  # (B, D)
        vector = timestep + _embedder(model).class_embedder.embedding_table(y)
        return PerBlockConditioning(timestep, vector, sinusoid=sinusoid, labels=y)

    def embed(self, model: DiTTransformer2DModel, x: Tensor, cond: Conditioning) -> Tensor:
        check_latent(x, self.shape(model))
        # Patches come out channels first, and every later layer would copy its input into rows.
        return model.pos_embed(x).contiguous()

    def decode(self, model: DiTTransformer2DModel, tokens: Tensor, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        shift, scale = model.proj_out_1(F.silu(cond.vector)).chunk(2, dim=1)
        patches = model.proj_out_2(modulate(model.norm_out(tokens), shift, scale))  # (B, N, P·P·C_out)
        side, P = model.config.sample_size // model.config.patch_size, model.config.patch_size
        patches = patches.view(-1, side, side, P, P, model.out_channels)
        pixels = patches.permute(0, 5, 1, 3, 2, 4)  # (B, C_out, rows, P, columns, P)
        return pixels.reshape(-1, model.out_channels, side * P, side * P)

    def modulation(self, block: Any, cond: Conditioning) -> Modulation:
        assert isinstance(cond, PerBlockConditioning) and cond.sinusoid is not None
        embedder = block.norm1.emb
        vector = _timestep(embedder, cond.sinusoid) + embedder.class_embedder.embedding_table(cond.labels)
        return Modulation(*block.norm1.linear(block.norm1.silu(vector)).chunk(6, dim=1))

    def modulations(self, blocks: Sequence[Any], cond: Conditioning) -> list[Modulation]:
        return [self.modulation(block, cond).for_tokens() for block in blocks]

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        return block.norm1.norm, block.norm3

    def attention(self, block: Any) -> AttentionParts:
        attn = block.attn1
        return AttentionParts((attn.to_q, attn.to_k, attn.to_v), attn.to_out[0], attn.heads)

    def cross(self, block: Any, tokens: Tensor, cond: Conditioning) -> Tensor:
        return tokens

    def mlp(self, block: Any) -> MlpParts:
        project_in, _, project_out = block.ff.net
        return MlpParts(project_in.proj, _gelu(project_in.approximate), project_out)


@cache
def _gelu(approximate: str) -> nn.GELU:
    return nn.GELU(approximate)


def _embedder(model: DiTTransformer2DModel) -> Any:
    """Embedder of timestep and label of block 0: the one that the final layer uses, and the routers."""
    return model.transformer_blocks[0].norm1.emb


def _sinusoid(model: DiTTransformer2DModel, t: Tensor) -> Tensor:
    return _embedder(model).time_proj(t).to(model.proj_out_1.weight.dtype)


def _timestep(embedder: Any, sinusoid: Tensor) -> Tensor:
    with without_autocast(sinusoid):
        return embedder.timestep_embedder(sinusoid)
