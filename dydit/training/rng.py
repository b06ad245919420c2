"""The random number generators of one process as plain data: taken, put back, scoped.

A step's own draws (timesteps, noise, dropped labels, the gates' noise) are a pure function of seed and step
(``batch.py``). What a backbone or a data set draws besides, dropout say, comes from the global generators, so
their state is in the checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RngState:
    """States of one process's generators.

    Args:
        tensors: torch's states as byte tensors, by device type.
        values: Python's and NumPy's states as JSON values.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def capture_rng() -> RngState:
    """The current states of Python's, NumPy's and torch's global generators (this process's GPU included)."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return RngState(
        tensors=tensors,
        values={
            "python": [version, list(words), gauss],
            "numpy": [str(name), [int(key) for key in np.asarray(keys)], *rest],
        },
    )


def restore_rng(state: RngState) -> None:
    """Put back what ``capture_rng`` took. A GPU state is left out on a machine without one."""
    version, words, gauss = state.values["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state.values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state.tensors["cpu"])
    if "cuda" in state.tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.tensors["cuda"])


@contextmanager
def scoped_rng() -> Iterator[None]:
    """Give the caller's global generators back as they were."""
    before = capture_rng()
    try:
        yield
    finally:
        restore_rng(before)
