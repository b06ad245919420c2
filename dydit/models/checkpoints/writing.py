"""A DiT written as a folder of safetensors: in our layout, whose names are the public ones, or diffusers'."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel

from dydit.files import new_folder
from dydit.models.checkpoints.diffusers_layout import COMPUTED, TABLE, diffusers_settings, timestep_drift
from dydit.models.checkpoints.names import expand
from dydit.models.dit import DiT


def write_public(model: DiT, folder: str | Path) -> None:
    """Write a DiT as this project's folder; the tensors have the names of the public files.

    Raises:
        OutputError: the folder cannot be written.
    """
    with new_folder(folder) as place:
        model.save_pretrained(place)


def write_diffusers(model: DiT, folder: str | Path, allow_inexact: bool = False) -> str:
    """Write a DiT as a folder that ``DiTTransformer2DModel.from_pretrained`` loads.

    Args:
        model: the DiT.
        folder: where to.
        allow_inexact: write a model with other timestep frequencies than diffusers' too (see
            ``timestep_drift``); the folder's README.md then says so.

    Returns:
        How the result differs from ``model``; empty where it computes the same.

    Raises:
        CheckpointError: diffusers' model cannot compute this DiT.
        OutputError: the folder cannot be written.
    """
    converted = to_diffusers(model, allow_inexact)
    drift = timestep_drift(model)
    note = (
        f"Not exact: the weights belong to timestep frequencies of shift {model.config.frequency_shift:g}, "
        f"and diffusers' model computes them with shift 1, which moves the timestep embedding by {drift:.1%}."
    )
    with new_folder(folder) as place:
        converted.save_pretrained(place)
        if drift:
            (place / "README.md").write_text(f"# Converted by dydit\n\n{note}\n", encoding="utf-8")
    return note if drift else ""


@torch.no_grad()
def to_diffusers(model: DiT, allow_inexact: bool = False) -> DiTTransformer2DModel:
    """diffusers' model around the weights of a DiT, which it shares, but for its embedders, one per block.

    Raises:
        CheckpointError: diffusers' model cannot compute this DiT.
    """
    settings = diffusers_settings(model, allow_inexact)
    state = model.state_dict()
    parts = {
        name: tensor
        for entry in expand(TABLE, [name for name in state if name not in COMPUTED], model.shape.depth)
        for name, tensor in zip(
            entry.theirs, entry.relation.split(state[entry.ours], len(entry.theirs)), strict=True
        )
    }
    with init_empty_weights():
        converted = DiTTransformer2DModel(**settings)
    converted.load_state_dict(parts, assign=True)
    return converted.train(model.training)
