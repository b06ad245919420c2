"""What the CPU at hand is good at, where PyTorch leaves a choice (``tools/measure_products.py``)."""

from __future__ import annotations

import torch


def has_amx() -> bool:
    """Whether it multiplies bfloat16 matrices in units of their own (Intel AMX)."""
    # Not in the older versions of PyTorch that we take: there, what suits any other processor is used.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16", False))


HAS_AMX = has_amx()
