"""Small models of foreign origin, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from core_builders import randomize
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from dydit.models.dit import DiT

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY: dict[str, Any] = {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "sample_size": 4}


def small_diffusers(seed: int = 0, equal_embedders: bool = True, **overrides: Any) -> DiTTransformer2DModel:
    """diffusers' DiT of two blocks, with random weights, in evaluation."""
    model = DiTTransformer2DModel(**{
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6,
        "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10, **overrides,
    }).eval()  # fmt: skip
    randomize(model, seed)
    if equal_embedders:
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def same_weights(ours: DiT, theirs: DiT) -> bool:
    """Whether two models hold bit-equal tensors by the same names."""
    state, other = ours.state_dict(), theirs.state_dict()
    return state.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in state.items())


def save_pt(path: Path, state: Mapping[str, Any], **options: Any) -> Path:
    """Write a ``.pt`` file and return its path."""
    torch.save(dict(state), path, **options)
    return path


def edit_weights(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of a model's folder, by their names; None takes one out."""
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file(
        {n: t for n, t in tensors.items() if t is not None}, folder / WEIGHTS, metadata={"format": "pt"}
    )
