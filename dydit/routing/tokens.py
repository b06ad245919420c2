"""Which tokens enter the MLP when their number is given: capacity mode, of masked model and engine."""

from __future__ import annotations

import torch
from torch import Tensor


def top_tokens(logits: Tensor, k: int) -> Tensor:
    """Positions (B, k), ascending, of the k highest logits (B, N) of each sample; of equal ones the first.

    Args:
        logits: of the token router; N of them per sample.
        k: 0..N, a Python number, so that the shape of the result is known beforehand.
    """
    # Not topk: it may take any of equal scores, and the engine has to take the masked model's.
    ranked = logits.sort(dim=1, descending=True, stable=True).indices
    return ranked[:, :k].sort(dim=1).values


def top_gates(logits: Tensor, k: int) -> Tensor:
    """0/1 gates (B, N), of the dtype of ``logits``: 1 at ``top_tokens``."""
    return torch.zeros_like(logits).scatter_(1, top_tokens(logits, k), 1.0)
