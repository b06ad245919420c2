"""What the CPU at hand is good at, where PyTorch leaves a choice (``tools/measure_products.py``)."""

from __future__ import annotations

import torch


def capabilities() -> dict[str, object]:
    """What PyTorch tells of the CPU. Older versions that we take tell nothing: there, its choices stay."""
    told: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return told


def has(capability: str) -> bool:
    """Whether PyTorch tells a capability."""
    return bool(capabilities().get(capability, False))


def without_onednn() -> frozenset[torch.dtype]:
    """Half precisions that oneDNN does not multiply here: PyTorch knows, but has no public name for it."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    there = torch.backends.mkldnn.is_available()
    return frozenset(t for t, name in asked.items() if not (there and getattr(torch.ops.mkldnn, name)()))


def faster_in_one_kernel() -> frozenset[torch.dtype]:
    """Precisions in which oneDNN's product, which adds the bias and applies GELU on its way, is the faster.

    bfloat16 with AMX; float32 on AMD's processors with AVX-512, where it is compared with Intel's MKL
    (``tools/measure_products.py``).
    """
    amd = "AMD" in str(capabilities().get("cpu_name"))
    found = {torch.bfloat16: has("amx_bf16"), torch.float32: amd and has("avx512_f")}
    return frozenset(dtype for dtype, faster in found.items() if faster)


def faster_with_activation() -> frozenset[torch.dtype]:
    """Precisions in which it is where GELU follows: bfloat16 also with AVX-512's instructions alone."""
    return faster_in_one_kernel() | ({torch.bfloat16} if has("avx512_bf16") else frozenset())


HAS_AMX = has("amx_bf16")  # units that multiply bfloat16 matrices
HAS_BF16 = has("avx512_bf16")  # instructions that multiply bfloat16 vectors
IN_ONE_KERNEL = faster_in_one_kernel()
ACTIVATED_IN_ONE_KERNEL = faster_with_activation()
WITHOUT_ONEDNN = without_onednn()  # asked once: it cannot be while something is traced
