"""Our DiT on diffusers' own models' weights computes what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_builders import randomize, relative_error, small_inputs
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor

from dydit.models.dit import DiT


def copy_linear(ours: Any, *theirs: Any) -> None:
    """Copy one linear layer, or several one below the other (q, k, v)."""
    ours.weight.copy_(torch.cat([layer.weight for layer in theirs]))
    ours.bias.copy_(torch.cat([layer.bias for layer in theirs]))


def copy_block(ours: Any, theirs: Any) -> None:
    copy_linear(ours.attn.qkv, theirs.attn1.to_q, theirs.attn1.to_k, theirs.attn1.to_v)
    copy_linear(ours.attn.proj, theirs.attn1.to_out[0])
    copy_linear(ours.mlp.fc1, theirs.ff.net[0].proj)
    copy_linear(ours.mlp.fc2, theirs.ff.net[2])


def copy_timestep_mlp(ours: DiT, theirs: Any) -> None:
    copy_linear(ours.t_embedder.mlp[0], theirs.linear_1)
    copy_linear(ours.t_embedder.mlp[2], theirs.linear_2)


@pytest.fixture()
def t() -> Tensor:
    return torch.tensor([0, 250, 999])


@torch.no_grad()
def test_adaln_zero_is_diffusers_dit(t: Tensor) -> None:
    theirs = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    randomize(theirs)
    for block in theirs.transformer_blocks:  # each holds its own copy of what is one embedder in the paper
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    ours = DiT(
        sample_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4, num_classes=10,
        frequency_shift=1.0, mlp_norm_eps=1e-5,
    ).eval()  # fmt: skip
    embedder = theirs.transformer_blocks[0].norm1.emb
    ours.x_embedder.proj.load_state_dict(theirs.pos_embed.proj.state_dict())
    copy_timestep_mlp(ours, embedder.timestep_embedder)
    ours.y_embedder.embedding_table.weight.copy_(embedder.class_embedder.embedding_table.weight)
    for mine, block in zip(ours.blocks, theirs.transformer_blocks, strict=True):
        copy_block(mine, block)
        copy_linear(mine.adaLN_modulation[1], block.norm1.linear)
    copy_linear(ours.final_layer.adaLN_modulation[1], theirs.proj_out_1)
    copy_linear(ours.final_layer.linear, theirs.proj_out_2)
    x, y = small_inputs(ours.shape)
    assert relative_error(ours(x, t, y), theirs(x, timestep=t, class_labels=y).sample) < 1e-5


@torch.no_grad()
def test_adaln_single_is_diffusers_pixart(t: Tensor) -> None:
    theirs = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2,
        cross_attention_dim=32, sample_size=8, patch_size=2, caption_channels=12,
    ).eval()  # fmt: skip
    randomize(theirs)
    ours = DiT(
        sample_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4,
        conditioning="adaln_single", context_dim=12, context_length=5,
    ).eval()  # fmt: skip
    ours.x_embedder.proj.load_state_dict(theirs.pos_embed.proj.state_dict())
    copy_timestep_mlp(ours, theirs.adaln_single.emb.timestep_embedder)
    copy_linear(ours.t_block[1], theirs.adaln_single.linear)
    copy_linear(ours.y_embedder.fc1, theirs.caption_projection.linear_1)
    copy_linear(ours.y_embedder.fc2, theirs.caption_projection.linear_2)
    for mine, block in zip(ours.blocks, theirs.transformer_blocks, strict=True):
        copy_block(mine, block)
        copy_linear(mine.cross_attn.q, block.attn2.to_q)
        copy_linear(mine.cross_attn.kv, block.attn2.to_k, block.attn2.to_v)
        copy_linear(mine.cross_attn.proj, block.attn2.to_out[0])
        mine.scale_shift_table.copy_(block.scale_shift_table)
    ours.final_layer.scale_shift_table.copy_(theirs.scale_shift_table)
    copy_linear(ours.final_layer.linear, theirs.proj_out)
    x, text = small_inputs(ours.shape)
    expected = theirs(
        x,
        encoder_hidden_states=text,
        timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    assert relative_error(ours(x, t, text), expected) < 1e-5
