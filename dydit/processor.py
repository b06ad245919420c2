"""What the CPU at hand is good at, where PyTorch leaves a choice (``tools/measure_products.py``)."""

from __future__ import annotations

import torch


def has(capability: str) -> bool:
    """Whether PyTorch tells a capability. Older versions that we take tell none: there, its choices stay."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get(capability, False))


def without_onednn() -> frozenset[torch.dtype]:
    """Half precisions that oneDNN does not multiply here: PyTorch knows, but has no public name for it."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    there = torch.backends.mkldnn.is_available()
    return frozenset(t for t, name in asked.items() if not (there and getattr(torch.ops.mkldnn, name)()))


HAS_AMX = has("amx_bf16")  # units that multiply bfloat16 matrices
HAS_BF16 = has("avx512_bf16")  # instructions that multiply bfloat16 vectors
WITHOUT_ONEDNN = without_onednn()  # asked once: it cannot be while something is traced
