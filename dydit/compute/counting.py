"""MACs of one call, counted by fvcore on what the call executed."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn

from dydit.models.embeddings import batch_timesteps

# Operators that hold no multiply-add in the papers' convention: elementwise work, reductions, comparisons and
# data movement. fvcore's own list lacks them; everything that is on neither list is reported as unsupported.
UNCOUNTED = """
    add add_ sub rsub mul mul_ div div_ neg exp log sin cos pow sqrt silu gelu sigmoid softmax addcmul
    index_add index_add_ index_select nonzero nonzero_numpy lt le logical_and scalar_tensor expand_as clone
    ones_like lift_fresh new_ones sum item any alias unflatten repeat numel linspace where resolve_conj
    resolve_neg embedding
"""


@dataclass(frozen=True)
class MacReport:
    """MACs of one call (1 MAC = 1 multiply-add = 2 FLOPs).

    Attributes:
        total: MACs of the whole call, all samples of the batch together.
        by_block: MACs per block and of the rest ("outside blocks"); sums to ``total``.
        by_op: MACs per operator; sums to ``total``.
        unsupported: operators that fvcore has no rule for -> how often they ran. Empty for everything the
            project ships; where it is not, ``total`` reads low.
    """

    total: int
    by_block: dict[str, int] = field(default_factory=dict)
    by_op: dict[str, int] = field(default_factory=dict)
    unsupported: dict[str, int] = field(default_factory=dict)

    @property
    def gmacs(self) -> float:
        """Total in 10⁹ MACs."""
        return self.total / 1e9

    @property
    def gflops(self) -> float:
        """Total in 10⁹ FLOPs: twice the MACs."""
        return 2 * self.gmacs


def count_macs(module: nn.Module, x: Tensor, t: Tensor | float, y: Tensor) -> MacReport:
    """Run ``module(x, t, y)`` once under fvcore and count what was executed.

    Args:
        module: a backbone, a DyDiT, a SubnetEngine, or any module with this call.
        x, t, y: the inputs of the call, as the module takes them.
    """
    analysis = FlopCountAnalysis(_KeepAlive(module), (x, batch_timesteps(t, x), y))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # "caller": an operator belongs to the block whose call ran it, wherever its weights live.
    analysis.ancestor_mode("caller")
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    for operator in UNCOUNTED.split():
        analysis.set_op_handle(f"aten::{operator}", None)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's: shapes and masks are meant to be those of this call
        total, by_op = int(analysis.total()), _integers(analysis.by_operator())
        by_module, unsupported = analysis.by_module(), dict(analysis.unsupported_ops())
    return MacReport(total, _by_block(module, by_module, total), by_op, unsupported)


class _KeepAlive(nn.Module):
    """Calls a module and returns, beside its output, what every layer inside returned.

    The tracer drops work that no output depends on, such as the scores of a token router that keep every
    token. It was executed, so it has to be counted.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        seen: list[Tensor] = []
        layers = [m for m in self.module.modules() if not any(True for _ in m.children())]
        hooks = [layer.register_forward_hook(lambda _m, _i, output: seen.append(output)) for layer in layers]
        try:
            return self.module(*inputs), *(output for output in seen if isinstance(output, Tensor))
        finally:
            for hook in hooks:
                hook.remove()


def _by_block(module: nn.Module, by_module: Counter[str], total: int) -> dict[str, int]:
    scopes: dict[str, str] = getattr(module, "mac_scopes", dict)()
    blocks = {name: int(by_module[f"module.{scope}"]) for name, scope in scopes.items()}
    return {**blocks, "outside blocks": total - sum(blocks.values())}


def _integers(counts: Counter[str]) -> dict[str, int]:
    return {name: int(count) for name, count in counts.items()}


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """query·keyᵀ and weights·value: B·H·N·M·(d + d_v). fvcore itself has no rule and leaves them out."""
    query, key, value = (get_shape(v) for v in inputs[:3])
    macs = math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return Counter({"scaled_dot_product_attention": macs})
