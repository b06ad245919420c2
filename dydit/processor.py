"""What the CPU at hand is good at, where PyTorch leaves a choice (``tools/measure_products.py``)."""

from __future__ import annotations

import torch


def has(capability: str) -> bool:
    """Whether PyTorch tells a capability. Older versions that we take tell none: there, its choices stay."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get(capability, False))


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of a dtype here: PyTorch knows, but has no public name for it."""
    if dtype not in HALF:
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, HALF[dtype])())


HALF = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
HAS_AMX = has("amx_bf16")  # units that multiply bfloat16 matrices
HAS_BF16 = has("avx512_bf16")  # instructions that multiply bfloat16 vectors
