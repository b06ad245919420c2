"""The Diffusion Transformer (Peebles & Xie 2023): every conditioning design, size, patch and resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from timm.layers import PatchEmbed
from torch import Tensor, nn

from dydit.costs import (
    ATTENTION_PROJECTIONS,
    CONDITIONING,
    DECODER,
    MLP,
    MODULATION_ROWS,
    PATCH_EMBEDDING,
)
from dydit.errors import ShapeError
from dydit.guidance import forward_with_cfg
from dydit.models.blocks import NORM_EPS, Block, Conditioning, FinalLayer
from dydit.models.embeddings import (
    LabelEmbedder,
    TextEmbedder,
    TimestepEmbedder,
    batch_timesteps,
    check_labels,
    check_per_sample,
    check_texts,
    sincos_position_embedding,
)
from dydit.models.presets import preset_arguments
from dydit.models.pretrained import PretrainedModel
from dydit.shapes import ModelShape

# Layer -> the part of the compute that it is; of nested layers the outer one's row counts.
LAYER_PARTS = {
    "x_embedder": PATCH_EMBEDDING,
    "t_embedder": CONDITIONING,
    "t_block": CONDITIONING,
    "y_embedder": CONDITIONING,
    "adaLN_modulation": CONDITIONING,
    "attn": ATTENTION_PROJECTIONS,
    "cross_attn": ATTENTION_PROJECTIONS,
    "mlp": MLP,
    "final_layer": DECODER,
}


class DiT(PretrainedModel, ConfigMixin):
    """Diffusion Transformer over latents.

    Args:
        sample_size: latent size, an int or (height, width).
        patch_size: side P of a patch.
        in_channels: latent channels C.
        hidden_size: D.
        depth: blocks L.
        num_heads: attention heads H.
        mlp_ratio: hidden units of the MLP over D.
        num_classes: classes without the null class, whose label is ``num_classes``.
        null_class: whether there is a null class, which guidance and label dropout need.
        learn_sigma: predict the covariance too (2C output channels).
        conditioning: ``in_context``, ``cross_attention``, ``adaln``, ``adaln_zero`` or ``adaln_single``
            (PixArt-α: y is then text tokens (B, M, context_dim)).
        context_dim: width of a text token (adaln_single).
        context_length: text tokens per sample (adaln_single).
        frequency_shift: see ``TimestepEmbedder``.
        mlp_norm_eps: see ``Block``.

    Raises:
        ShapeError: the numbers do not fit together.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        conditioning: str = "adaln_zero",
        context_dim: int = 0,
        context_length: int = 0,
        frequency_shift: float = 0.0,
        mlp_norm_eps: float = NORM_EPS,
        null_class: bool = True,
    ) -> None:
        super().__init__()
        self.shape = ModelShape(
            sample_size=_sides(sample_size),
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=in_channels * (2 if learn_sigma else 1),
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_hidden=int(hidden_size * mlp_ratio),
            mlp_groups=num_heads,
            num_classes=num_classes,
            null_class=null_class,
            conditioning=conditioning,
            context_dim=context_dim,
            context_length=context_length,
        )
        self.gradient_checkpointing = False
        self.x_embedder = PatchEmbed(self.shape.sample_size, patch_size, in_channels, hidden_size)
        self.register_buffer("pos_embed", sincos_position_embedding(hidden_size, self.shape.grid))
        self.t_embedder = TimestepEmbedder(hidden_size, frequency_shift)
        if conditioning == "adaln_single":
            self.y_embedder: nn.Module = TextEmbedder(context_dim, context_length, hidden_size)
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        else:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_class)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, self.shape.mlp_hidden, conditioning, mlp_norm_eps)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.shape.out_channels, conditioning)
        self._initialize_weights()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> DiT:
        """A model of a published size, such as ``DiT-XL/2``; ``overrides`` are constructor arguments.

        Raises:
            ConfigError: there is no such preset.
        """
        return cls(**{**preset_arguments(name), **overrides})

    @property
    def null_label(self) -> int | Tensor | None:
        """What takes a label's place in guidance: the null class, or the tokens (M, context_dim) of no text.

        None where the model has no null class.
        """
        if isinstance(self.y_embedder, TextEmbedder):
            return self.y_embedder.null_text
        return self.shape.num_classes if self.shape.null_class else None

    def forward(self, x: Tensor, t: Tensor | float, y: Tensor) -> Tensor:
        """Predict the noise (and, with ``learn_sigma``, the covariance) of noisy latents.

        Args:
            x: latents (B, C, height, width).
            t: timesteps (B,) in 0..1000, or one number for the whole batch.
            y: labels (B,), or text tokens (B, M, context_dim) with ``adaln_single``.

        Returns:
            (B, C, height, width), or (B, 2C, height, width) with ``learn_sigma``.

        Raises:
            ShapeError: x is not of the model's latent shape, t or y is not one per sample, or a text is of
                another width.
            DataError: a label lies outside the table.
        """
        cond = self.condition(batch_timesteps(t, x), y)
        tokens = self.embed(x, cond)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, tokens, cond)
            else:
                tokens = block(tokens, cond)
        return self.decode(tokens, cond)

    forward_with_cfg = forward_with_cfg

    def condition(self, t: Tensor, y: Tensor) -> Conditioning:
        """Timesteps (B,) and labels or texts to what the blocks are conditioned on."""
        timestep = self.t_embedder(t)  # (B, D)
        if self.shape.conditioning == "adaln_single":
            check_texts(y, t.shape[0], self.shape.context_dim)
            shared = self.t_block(timestep).unflatten(1, (6, -1))  # (B, 6, D)
            return Conditioning(timestep, shared=shared, context=self.y_embedder(y))
        check_per_sample("labels", y, t.shape[0])
        check_labels(y, self.shape.num_classes, self.shape.null_class)
        label = self.y_embedder(y)  # (B, D)
        pair = torch.stack([timestep, label], dim=1)  # (B, 2, D)
        if self.shape.conditioning == "in_context":
            return Conditioning(timestep, tokens=pair)
        if self.shape.conditioning == "cross_attention":
            return Conditioning(timestep, context=pair)
        return Conditioning(timestep, vector=timestep + label)

    def embed(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Latents x (B, C, height, width) to tokens (B, N, D), with those of the conditioning behind them."""
        check_latent(x, self.shape)
        # Patches come out channels first, and every later layer would copy its input into rows.
        tokens = (self.x_embedder(x) + self.pos_embed.to(x.dtype)).contiguous()
        return tokens if cond.tokens is None else torch.cat([tokens, cond.tokens], dim=1)

    def decode(self, tokens: Tensor, cond: Conditioning) -> Tensor:
        """Tokens (B, N, D) to the prediction (B, C_out, height, width)."""
        (rows, columns), P = self.shape.grid, self.shape.patch_size
        patches = self.final_layer(tokens[:, : rows * columns], cond)  # (B, N, P·P·C_out)
        patches = patches.view(-1, rows, columns, P, P, self.shape.out_channels)
        pixels = patches.permute(0, 5, 1, 3, 2, 4)  # (B, C_out, rows, P, columns, P)
        return pixels.reshape(-1, self.shape.out_channels, *self.shape.sample_size)

    def mac_scopes(self) -> dict[str, str]:
        """Name of each block in a MAC report -> the submodule whose call it is."""
        return {f"block {i}": f"blocks.{i}" for i in range(self.shape.depth)}

    def mac_parts(self) -> dict[str, str]:
        """Name of a layer -> its part in a MAC report."""
        return LAYER_PARTS

    def _initialize_weights(self) -> None:
        """Xavier for linear layers, N(0, 0.02²) for embeddings, zero for modulations and the last layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection: Any = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(projection.bias)
        blocks: Any = self.blocks
        small: list[Any] = [self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        if isinstance(self.y_embedder, LabelEmbedder):
            small.append(self.y_embedder.embedding_table)
        if self.shape.conditioning == "adaln_single":
            small.append(self.t_block[1])
        for layer in small:
            nn.init.normal_(layer.weight, std=0.02)
        if self.shape.conditioning in MODULATION_ROWS:
            for module in (*blocks, self.final_layer):
                nn.init.zeros_(module.adaLN_modulation[1].weight)
        if self.shape.conditioning in ("cross_attention", "adaln_single"):
            for block in blocks:
                nn.init.zeros_(block.cross_attn.proj.weight)
        nn.init.zeros_(self.final_layer.linear.weight)


def _sides(sample_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a sample size; a wrong number of sides is left for ``ModelShape`` to refuse."""
    sides = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
    return cast("tuple[int, int]", sides)


def check_latent(x: Tensor, shape: ModelShape) -> None:
    """Refuse a latent that the model was not built for.

    Raises:
        ShapeError: x is not (B, in_channels, height, width).
    """
    expected = (shape.in_channels, *shape.sample_size)
    if x.ndim != 4 or tuple(x.shape[1:]) != expected:
        raise ShapeError(
            f"latent of shape {tuple(x.shape)}",
            expected=f"(batch, {', '.join(map(str, expected))})",
            remedy="give a batch of that size, or a model built for this one",
        )
