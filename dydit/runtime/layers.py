"""Attention and MLP on sliced weights, as functions.

Each takes a ``workspace``: memory for what it computes on its way, and for its result; None: new memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit.processor import ACTIVATED_IN_ONE_KERNEL, HAS_AMX, HAS_BF16, IN_ONE_KERNEL
from dydit.runtime.packing import PackedBlock, Weights
from dydit.runtime.workspace import Workspace, space

SCORES = 1 << 20  # of attention at a time: 2 MB in bfloat16, which stay in the cache
# oneDNN's product with what follows it; PyTorch has no public name for it, and on some platforms nothing.
_POINTWISE: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


def sliced_attention(packed: PackedBlock, x: Tensor, workspace: Workspace | None = None) -> Tensor:
    """Self-attention of the active heads over x (B, N, D)."""
    B, N, D = x.shape
    if not packed.qkv:  # no head: what is left of the layer is the bias of its output projection
        bias = packed.out[1]
        return x.new_zeros(B, N, D) if bias is None else bias.expand(B, N, D)
    projected, d = [linear(x, layer, workspace) for layer in packed.qkv], packed.head_dim
    if packed.by_head:
        q, k, v = projected[0].view(B, N, -1, 3, d).permute(3, 0, 2, 1, 4)  # (B, h, N, d) each
    elif len(projected) == 1:
        q, k, v = projected[0].view(B, N, 3, -1, d).permute(2, 0, 3, 1, 4)
    else:
        q, k, v = (p.view(B, N, -1, d).transpose(1, 2) for p in projected)
    attended = self_attention(q, k, v, workspace).transpose(1, 2)  # (B, N, h, d)
    return linear(_contiguous(attended, workspace).view(B, N, -1), packed.out, workspace)


def self_attention(q: Tensor, k: Tensor, v: Tensor, workspace: Workspace | None = None) -> Tensor:
    """softmax(q·kᵀ/√d)·v over heads (B, h, N, d).

    In bfloat16 on a CPU that has instructions for it, but no AMX, PyTorch's fused kernel takes up to 1,024
    tokens longer than the two products and the softmax, of as many heads at a time as have ``SCORES`` scores
    (``tools/measure_products.py``). Not in compiled code, whose sizes are symbolic.
    """
    N = q.shape[2]
    if (
        not HAS_BF16
        or HAS_AMX
        or q.dtype != torch.bfloat16
        or N * N > SCORES
        or q.device.type != "cpu"
        or torch.compiler.is_compiling()
    ):
        return F.scaled_dot_product_attention(q, k, v)
    return _attention_in_products(q, k, v, SCORES // (N * N), workspace)


def _attention_in_products(
    q: Tensor, k: Tensor, v: Tensor, at_a_time: int, workspace: Workspace | None
) -> Tensor:
    """Attention of ``at_a_time`` heads after others."""
    B, h, N, d = q.shape
    scaled = torch.mul(q, d**-0.5, out=space(workspace, q, B, h, N, d))
    q, k, v = (_contiguous(t, workspace).view(B * h, N, d) for t in (scaled, k, v))
    scores, weights = (space(workspace, q, min(at_a_time, B * h), N, N) for _ in range(2))
    attended = space(workspace, q, B * h, N, d)
    parts = []
    for start in range(0, B * h, at_a_time):
        end = min(start + at_a_time, B * h)
        scored = torch.bmm(q[start:end], k[start:end].transpose(1, 2), out=_first(scores, end - start))
        weighed = torch.softmax(scored, -1, out=_first(weights, end - start))
        parts.append(torch.bmm(weighed, v[start:end], out=None if attended is None else attended[start:end]))
    if attended is None:
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
    return attended.view(B, h, N, d)


def sliced_mlp(
    packed: PackedBlock,
    act: Callable[[Tensor], Tensor],
    x: Tensor,
    workspace: Workspace | None = None,
    any_size: bool = False,
) -> Tensor:
    """MLP of the active groups over x (..., D); ``any_size``: see ``linear``."""
    if packed.fc1 is None:
        bias = packed.fc2[1]
        return torch.zeros_like(x) if bias is None else bias.expand_as(x)
    hidden = linear(x, packed.fc1, workspace, act, any_size)
    return linear(hidden, packed.fc2, workspace, any_size=any_size)


def linear(
    x: Tensor,
    layer: Weights,
    workspace: Workspace | None = None,
    act: Callable[[Tensor], Tensor] | None = None,
    any_size: bool = False,
) -> Tensor:
    """A linear layer over x (..., in).

    Args:
        act: activation of what it gives; None: none.
        any_size: whether hardly two calls have the same number of rows.
    """
    weight, bias = layer
    if workspace is None:
        result = F.linear(x, weight, bias)
        return result if act is None else act(result)
    gelu = act.approximate if isinstance(act, nn.GELU) else None
    if not any_size and in_one_kernel(x, weight, activated=act is not None):
        if act is None:
            return _POINTWISE(x, weight, bias, "none", [], "")
        if gelu:
            return _POINTWISE(x, weight, bias, "gelu", [], gelu)
        if isinstance(act, nn.ReLU):
            return _POINTWISE(x, weight, bias, "relu", [], "")
    rows = x.view(-1, x.shape[-1])
    out = workspace.empty((rows.shape[0], weight.shape[0]), x.dtype)
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)
    out = out.view(*x.shape[:-1], -1)
    if gelu:
        return torch.ops.aten.gelu.out(out, approximate=gelu, out=out)
    return out if act is None else act(out)


def in_one_kernel(x: Tensor, weight: Tensor, activated: bool = False) -> bool:
    """Whether oneDNN's product, which adds the bias and applies GELU or ReLU on its way, is what to take.

    Where it is faster (``processor``), but for rows of any number: it makes and keeps a kernel for each,
    which BLAS does not. It takes new memory. Inductor uses it too.

    Args:
        activated: whether GELU or ReLU follows.
    """
    faster = ACTIVATED_IN_ONE_KERNEL if activated else IN_ONE_KERNEL
    if x.dtype not in faster or not torch.backends.mkldnn.enabled:
        return False
    return weight.is_contiguous() or weight.t().is_contiguous()  # else many times slower


def _contiguous(x: Tensor, workspace: Workspace | None) -> Tensor:
    if workspace is None or x.is_contiguous():
        return x.contiguous()
    return workspace.empty(x.shape, x.dtype).copy_(x)


def _first(tensor: Tensor | None, count: int) -> Tensor | None:
    return None if tensor is None else tensor[:count]
