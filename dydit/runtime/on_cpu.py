"""A sliced block on the CPU: the twin of ``runtime.sliced``, with as few calls as there can be.

On a CPU nothing overlaps: while Python runs, or PyTorch looks for an operator, no product does; and after
each product, which leaves little else in the caches, that takes several times as long as alone. So here
tokens are written over in place, results lie in a workspace, modulations are made for all blocks at once, and
layers are read, not called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit.models.blocks import Conditioning, Modulation
from dydit.runtime.layers import linear, sliced_attention, sliced_mlp
from dydit.runtime.packing import PackedBlock
from dydit.runtime.sliced import SlicedBlock, filled_up, top_rows
from dydit.runtime.workspace import Workspace


class BlockOnCpu:
    """Runs one block of a backbone with packed weights, not compiled, without autocast.

    Args:
        block: the block as it runs elsewhere.
    """

    def __init__(self, block: SlicedBlock) -> None:
        self._block = block
        adapter, backbone_block, router = block.parts
        self._router: Any = router
        self._norm_attn, self._norm_mlp = (_function_of(norm) for norm in adapter.norms(backbone_block))
        self._act = adapter.mlp(backbone_block).act

    def __call__(
        self,
        x: Tensor,
        cond: Conditioning,
        m: Modulation,
        packed: PackedBlock,
        capacity: int | None,
        fill_up: bool,
        workspace: Workspace,
    ) -> Tensor:
        """Tokens x (B, N, D), contiguous, to tokens (B, N, D); x itself may be written over.

        Args:
            cond, packed, capacity, fill_up: as ``SlicedBlock`` takes them.
            m: of the block, for tokens.
            workspace: memory for what is computed on the way.
        """
        workspace.restart()
        x = self._attend(x, cond, m, packed, workspace)
        logits = None if self._router is None else self._logits(x, workspace)
        self._block.tell(logits)
        B, N, _ = x.shape
        if logits is None or capacity == N:
            return self._mlp_of_all(x, m, packed, workspace)
        if capacity is None:
            above = logits > self._block.token_logit
            counts = torch.count_nonzero(above, 1).tolist()
        else:
            counts = [capacity] * B
        total = sum(counts)
        if total == B * N:
            return self._mlp_of_all(x, m, packed, workspace)
        if not total:
            return x
        kept = above.view(-1).nonzero().view(-1) if capacity is None else top_rows(logits, capacity)
        rows = kept
        if fill_up:  # with the last token again and again, as rows ascend
            more = filled_up(total) - total
            rows = F.pad(kept, (0, more), value=B * N - 1)
            counts[-1] += more
        self._mlp_of_rows(x, m, packed, kept, rows, counts, not fill_up, workspace)
        return x

    def _attend(
        self, x: Tensor, cond: Conditioning, m: Modulation, packed: PackedBlock, workspace: Workspace
    ) -> Tensor:
        normed = self._norm_attn(x)
        _modulate(normed, m.shift_attn, m.scale_attn)
        _add_gated(x, sliced_attention(packed, normed, workspace), m.gate_attn)
        adapter, block, _ = self._block.parts
        return adapter.cross(block, x, cond)

    def _logits(self, x: Tensor, workspace: Workspace) -> Tensor:
        """The token router's logits (B, N)."""
        first, activation, score = self._router
        hidden = linear(x, (first.weight, first.bias), workspace, activation)
        return F.linear(hidden, score.weight, score.bias).squeeze(-1)  # oneDNN would take longer

    def _mlp_of_all(self, x: Tensor, m: Modulation, packed: PackedBlock, workspace: Workspace) -> Tensor:
        workspace.restart()
        normed = self._norm_mlp(x)
        _modulate(normed, m.shift_mlp, m.scale_mlp)
        _add_gated(x, sliced_mlp(packed, self._act, normed, workspace), m.gate_mlp)
        return x

    def _mlp_of_rows(
        self,
        x: Tensor,
        m: Modulation,
        packed: PackedBlock,
        kept: Tensor,
        rows: Tensor,
        counts: Sequence[int],
        any_size: bool,
        workspace: Workspace,
    ) -> None:
        """Add the MLP's branch to the tokens ``kept`` (K,) of the flattened batch.

        Args:
            rows: tokens (K',) to compute, ascending, of which ``kept`` are the first.
            counts: how many of them are of each sample.
            any_size: whether hardly two calls have as many.
        """
        workspace.restart()
        flat = x.view(-1, x.shape[-1])
        tokens = workspace.empty((len(rows), flat.shape[1]), x.dtype)
        torch.index_select(flat, 0, rows, out=tokens)
        normed = self._norm_mlp(tokens)
        if m.shift_mlp is not None and m.scale_mlp is not None:
            of_samples = normed.split_with_sizes(counts), m.shift_mlp.unbind(), m.scale_mlp.unbind()
            for part, shift, scale in zip(*of_samples, strict=True):
                _modulate(part, shift, scale)
        update = sliced_mlp(packed, self._act, normed, workspace, any_size)
        if m.gate_mlp is None:
            tokens += update
        else:
            of_samples = tokens.split_with_sizes(counts), update.split_with_sizes(counts), m.gate_mlp.unbind()
            for part, branch, gate in zip(*of_samples, strict=True):
                _add_gated(part, branch, gate)
        _put_rows(flat, kept, tokens[: len(kept)])


def _function_of(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """A norm without what ``nn.Module`` does around it."""
    if type(norm) is not nn.LayerNorm or norm.elementwise_affine:
        return norm.forward
    shape, eps = norm.normalized_shape, norm.eps
    return lambda x: torch.layer_norm(x, shape, None, None, eps)


def _modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> None:
    if shift is not None and scale is not None:
        torch.addcmul(shift, x, scale, out=x)


def _add_gated(x: Tensor, branch: Tensor, gate: Tensor | None) -> None:
    if gate is None:
        x += branch
    else:
        torch.addcmul(x, gate, branch, out=x)


def _put_rows(target: Tensor, places: Tensor, rows: Tensor) -> None:
    """Write ``rows`` (K, D) to ``places`` (K,) of the target (M, D).

    ``index_copy_`` copies one number after another: so few and large ones, where rows are made of such.
    """
    width = torch.complex128.itemsize
    sizes = (t.itemsize * n for t in (target, rows) for n in (t.shape[1], t.storage_offset()))
    if not any(size % width for size in sizes):
        target, rows = target.view(torch.complex128), rows.view(torch.complex128)
    target.index_copy_(0, places, rows)
