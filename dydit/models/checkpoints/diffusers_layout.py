"""diffusers' ``DiTTransformer2DModel``: its names and settings against ours, in both directions.

It computes a DiT with adaLN-Zero, with three differences: every block holds a copy of the embedders of
timestep and label; the sinusoid's frequencies are shifted (``frequency_shift`` 1); and the MLP's norm has an
epsilon of its own (``norm_eps``). All three are settings of our ``DiT`` or of these tables.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from dydit.errors import CheckpointError
from dydit.models.checkpoints.config_file import defaults_of
from dydit.models.checkpoints.names import COPIES, ROWS, Row
from dydit.models.dit import DiT
from dydit.models.embeddings import TimestepEmbedder, sincos_position_embedding

# diffusers.models.embeddings.CombinedTimestepLabelEmbeddings: downscale_freq_shift=1.
FREQUENCY_SHIFT = 1.0

# diffusers.models.attention.FeedForward: mult=4.
MLP_RATIO = 4.0

_BLOCK, _COPY = "transformer_blocks.{i}", "transformer_blocks.{every}.norm1.emb"
_QKV = tuple(f"{_BLOCK}.attn1.to_{part}.{{rest}}" for part in "qkv")

TABLE = (
    Row("x_embedder.{rest}", ("pos_embed.{rest}",)),
    Row("t_embedder.mlp.0.{rest}", (f"{_COPY}.timestep_embedder.linear_1.{{rest}}",), COPIES),
    Row("t_embedder.mlp.2.{rest}", (f"{_COPY}.timestep_embedder.linear_2.{{rest}}",), COPIES),
    Row("y_embedder.{rest}", (f"{_COPY}.class_embedder.{{rest}}",), COPIES),
    Row("blocks.{i}.adaLN_modulation.1.{rest}", (f"{_BLOCK}.norm1.linear.{{rest}}",)),
    Row("blocks.{i}.attn.qkv.{rest}", _QKV, ROWS),
    Row("blocks.{i}.attn.proj.{rest}", (f"{_BLOCK}.attn1.to_out.0.{{rest}}",)),
    Row("blocks.{i}.mlp.fc1.{rest}", (f"{_BLOCK}.ff.net.0.proj.{{rest}}",)),
    Row("blocks.{i}.mlp.fc2.{rest}", (f"{_BLOCK}.ff.net.2.{{rest}}",)),
    Row("final_layer.adaLN_modulation.1.{rest}", ("proj_out_1.{rest}",)),
    Row("final_layer.linear.{rest}", ("proj_out_2.{rest}",)),
)

# Computed there from the sample size, stored here.
COMPUTED = ("pos_embed",)

# Settings with which diffusers' model computes what a DiT does.
_SAME_FUNCTION = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "dropout": 0.0,
}

# Settings of the class that the first published folders name (Transformer2DModel), where they change nothing.
LEGACY_SETTINGS = {
    "attention_type": "default",
    "caption_channels": None,
    "cross_attention_dim": None,
    "double_self_attention": False,
    "interpolation_scale": None,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_additional_conditions": None,
    "use_linear_projection": False,
}


def dit_arguments(label: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of our ``DiT`` for checked settings of diffusers' model.

    Raises:
        CheckpointError: with these settings it is no DiT.
    """
    settings = {**defaults_of(DiTTransformer2DModel), **settings}
    for name, expected in _SAME_FUNCTION.items():
        if settings[name] != expected:
            raise CheckpointError(
                f"{label}: {name} is {settings[name]!r}",
                expected=f"{expected!r}, as a DiT has",
                remedy="load it with diffusers, and convert the model itself with dydit.convert",
            )
    in_channels, out_channels = settings["in_channels"], settings["out_channels"] or settings["in_channels"]
    if out_channels not in (in_channels, 2 * in_channels):
        raise CheckpointError(
            f"{label}: out_channels is {out_channels}", expected=f"{in_channels} or {2 * in_channels}"
        )
    return {
        "sample_size": settings["sample_size"],
        "patch_size": settings["patch_size"],
        "in_channels": in_channels,
        "hidden_size": settings["num_attention_heads"] * settings["attention_head_dim"],
        "depth": settings["num_layers"],
        "num_heads": settings["num_attention_heads"],
        "mlp_ratio": MLP_RATIO,
        "num_classes": settings["num_embeds_ada_norm"],
        "learn_sigma": out_channels == 2 * in_channels,
        "frequency_shift": FREQUENCY_SHIFT,
        "mlp_norm_eps": settings["norm_eps"],
    }


def diffusers_settings(model: DiT, allow_inexact: bool = False) -> dict[str, Any]:
    """Constructor arguments of the ``DiTTransformer2DModel`` that computes what ``model`` does.

    Args:
        model: a DiT.
        allow_inexact: take the one difference that leaves a usable model: another frequency shift.

    Raises:
        CheckpointError: there is none; says why.
    """
    shape, config = model.shape, model.config
    if reason := _other_function(model):
        raise CheckpointError(f"diffusers' DiTTransformer2DModel cannot compute this DiT: {reason}")
    if config.frequency_shift != FREQUENCY_SHIFT and not allow_inexact:
        raise CheckpointError(
            f"this DiT's timestep frequencies have shift {config.frequency_shift:g}; "
            f"diffusers' model would move the timestep embedding by {timestep_drift(model):.1%}",
            expected=f"shift {FREQUENCY_SHIFT:g}, which diffusers' model has built in",
            remedy="keep the public layout, or allow an inexact conversion",
        )
    return {
        "num_attention_heads": shape.num_heads,
        "attention_head_dim": shape.head_dim,
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "num_layers": shape.depth,
        "sample_size": shape.sample_size[0],
        "patch_size": shape.patch_size,
        "num_embeds_ada_norm": shape.num_classes,
        "norm_eps": config.mlp_norm_eps,
    }


@torch.no_grad()
def timestep_drift(model: DiT) -> float:
    """How far diffusers' frequencies would move the timestep embedding: ‖Δ‖/‖embedding‖ over t = 0…999."""
    shifted = TimestepEmbedder(model.shape.hidden_size, FREQUENCY_SHIFT)
    shifted.mlp = model.t_embedder.mlp
    t = torch.arange(1000, device=model.pos_embed.device)
    ours = model.t_embedder(t).float()
    return float((shifted(t).float() - ours).norm() / ours.norm().clamp_min(1e-30))


def _other_function(model: DiT) -> str:
    """What about a DiT no setting of diffusers' model expresses; empty where there is nothing."""
    shape = model.shape
    differences = {
        f"its conditioning is {shape.conditioning}": shape.conditioning != "adaln_zero",
        f"its latents of {shape.sample_size} are not square": len(set(shape.sample_size)) > 1,
        f"its MLP is not {MLP_RATIO:g} times as wide": shape.mlp_hidden != MLP_RATIO * shape.hidden_size,
        "it has no null class": not shape.null_class,
        "its position embedding is not the plain sine-cosine one": not _plain_positions(model),
    }
    return next((text for text, differs in differences.items() if differs), "")


def _plain_positions(model: DiT) -> bool:
    """Whether the stored position embedding is the one that diffusers computes."""
    plain = sincos_position_embedding(model.shape.hidden_size, model.shape.grid)
    # What is stored in half precision comes back as more precise sines: the better of the two.
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-5}.get(model.pos_embed.dtype, 5e-3)
    return torch.allclose(model.pos_embed.float().cpu(), plain, rtol=0, atol=tolerance)
