"""MACs of one call, counted by fvcore on what the call executed."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn

from dydit.compute.table import OTHER, OUTSIDE, MacTable
from dydit.costs import ATTENTION_PRODUCTS, DECODER, NORMS
from dydit.models.embeddings import batch_timesteps

# Operators that hold no multiply-add in the papers' convention: elementwise work, reductions, comparisons and
# data movement. fvcore's own list lacks them; everything that is on neither list is reported as unsupported.
UNCOUNTED = """
    add add_ sub rsub mul mul_ div div_ neg exp log sin cos pow sqrt silu gelu sigmoid softmax addcmul
    index_add index_add_ index_copy index_copy_ index_select nonzero nonzero_numpy lt le logical_and
    scalar_tensor expand_as clone ones_like lift_fresh new_ones sum item any alias unflatten repeat numel
    linspace where resolve_conj resolve_neg embedding sort pad pin_memory
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
        table: MACs per block and part of the network; sums to ``total``.
    """

    total: int
    by_block: dict[str, int] = field(default_factory=dict)
    by_op: dict[str, int] = field(default_factory=dict)
    unsupported: dict[str, int] = field(default_factory=dict)
    table: MacTable = field(default_factory=MacTable)

    @property
    def by_part(self) -> dict[str, int]:
        """MACs per part of the network (``dydit.costs.PARTS``); sums to ``total``."""
        return self.table.by_part

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
    analysis = _NamedCounts(_KeepAlive(module), (x, batch_timesteps(t, x), y))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # "caller": an operator belongs to the block whose call ran it, wherever its weights live.
    analysis.ancestor_mode("caller")
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    for operator in UNCOUNTED.split():
        analysis.set_op_handle(f"aten::{operator}", None)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's: shapes and masks are meant to be those of this call
        counts, unsupported = analysis.by_operator(), dict(analysis.unsupported_ops())
    table, by_op = _table(module, counts), _by_operator(counts)
    return MacReport(table.total, table.by_block, by_op, unsupported, table)


class _NamedCounts(FlopCountAnalysis):
    """fvcore's count, where an operator's name tells in which modules' calls it ran: "operator@/a/a.b"."""

    def set_op_handle(self, *args: Any, **kwargs: Any) -> _NamedCounts:
        given = {**dict(zip(args[::2], args[1::2], strict=True)), **kwargs}
        return super().set_op_handle(
            **{name: handle and _named(name, handle) for name, handle in given.items()}
        )


def _named(name: str, handle: Any) -> Any:
    def count(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        counted = handle(inputs, outputs)  # a number, or numbers by operator
        by_op = counted if isinstance(counted, Counter) else {name.removeprefix("aten::"): counted}
        scope = outputs[0].node().scopeName()
        return Counter({f"{op}@{scope}": int(macs) for op, macs in by_op.items()})

    return count


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


def _table(module: nn.Module, counts: Mapping[str, int]) -> MacTable:
    """MACs per block and part: where an operator belongs is told by the modules in whose calls it ran."""
    scopes: dict[str, str] = getattr(module, "mac_scopes", dict)()
    parts: dict[str, str] = getattr(module, "mac_parts", dict)()
    cells: dict[str, Counter[str]] = {block: Counter() for block in (*scopes, OUTSIDE)}
    for name, macs in counts.items():
        operator, _, running = name.partition("@")
        calls = [call.removeprefix("module.") for call in running.split("/")]
        cells[_block(calls, scopes)][_part(operator, calls[-1], parts)] += macs
    return MacTable(cells)


def _block(calls: list[str], scopes: Mapping[str, str]) -> str:
    for block, scope in scopes.items():
        if any(call == scope or call.startswith(f"{scope}.") for call in calls):
            return block
    return OUTSIDE


def _part(operator: str, layer: str, parts: Mapping[str, str]) -> str:
    if operator in ("scaled_dot_product_attention", "bmm"):  # of two activations: the others have weights
        return ATTENTION_PRODUCTS
    part = next((parts[name] for name in layer.split(".") if name in parts), OTHER)
    # The final norm is the decoder's.
    return NORMS if operator == "layer_norm" and part != DECODER else part


def _by_operator(counts: Mapping[str, int]) -> dict[str, int]:
    by_op: Counter[str] = Counter()
    for name, macs in counts.items():
        by_op[name.partition("@")[0]] += macs
    return dict(by_op)


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """query·keyᵀ and weights·value: B·H·N·M·(d + d_v). fvcore itself has no rule and leaves them out."""
    query, key, value = (get_shape(v) for v in inputs[:3])
    macs = math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return Counter({"scaled_dot_product_attention": macs})
