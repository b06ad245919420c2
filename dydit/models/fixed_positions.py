"""The fixed position embedding of a DiT need not be stored: it is computed from the sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dydit.models.embeddings import sincos_position_embedding

NAME = "pos_embed"


def computed_positions(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a model's state dict that building the model gives back: the position embeddings in it.

    Args:
        model: a DiT, or a model around one.

    Returns:
        Name -> value, as it is in the model. One that holds other values (a public file may bring its own) is
        not among them.
    """
    found = {}
    for path, module in model.named_modules():
        shape, positions = getattr(module, "shape", None), dict(module.named_buffers(recurse=False)).get(NAME)
        if shape is None or positions is None:
            continue
        computed = sincos_position_embedding(shape.hidden_size, shape.grid).to(positions)
        if torch.equal(positions, computed):
            found[f"{path}.{NAME}" if path else NAME] = positions
    return found


@contextmanager
def computed_left_out(model: nn.Module) -> Iterator[None]:
    """The model's state dict without ``computed_positions``, for as long as the context lasts."""
    names = tuple(computed_positions(model))

    def drop(_model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for name in names:
            state.pop(prefix + name, None)

    handle = model.register_state_dict_post_hook(drop)
    try:
        yield
    finally:
        handle.remove()
