"""Texts of a calibration set."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dydit.errors import DataError


def read_texts(path: Path) -> Tensor:
    """Text tokens (m, M, context_dim): the one tensor of a safetensors file, whatever its name.

    Raises:
        DataError: there is no such file, or something else in it.
    """
    remedy = "save what the text encoder gave with safetensors.torch.save_file"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"texts {path} cannot be read ({error})", remedy=remedy) from error
    texts = next(iter(tensors.values()), None)
    if texts is None or len(tensors) > 1 or texts.ndim != 3 or not texts.is_floating_point():
        found = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors.items()) or "nothing"
        raise DataError(
            f"{path} holds {found}", expected="one tensor (texts, tokens, width) of numbers", remedy=remedy
        )
    return texts
