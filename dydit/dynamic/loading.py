"""``load_dydit``: trained dynamic models from where users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dydit.dynamic.dydit import DyDiT
from dydit.models.loading import load_folder


def load_dydit(path: str | Path, **options: Any) -> DyDiT:
    """Load a DyDiT.

    Args:
        path: a folder written by ``save_pretrained``, or a Hub id.
        options: passed on to ``from_pretrained`` (``revision``, ``torch_dtype``, …).

    Raises:
        CheckpointError: missing, truncated, or of another architecture.
    """
    return load_folder(DyDiT, path, **options)
