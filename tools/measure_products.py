"""Why products and copies are written as they are: the chosen form against the plain one, in turns.

    python tools/measure_products.py

At the sizes of DiT-XL/2 (D 1152, 16 heads of 72, 256 tokens). Prints how many times as long the plain form
takes: median and quartiles over the rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import cycle

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit.adapters.base import MlpParts
from dydit.compute.latency import measure_interleaved, paired_speedup
from dydit.models.blocks import ModulationLinear
from dydit.precision import DTYPES
from dydit.runtime.layers import linear, self_attention
from dydit.runtime.slots import mlp_slots
from dydit.runtime.workspace import Workspace

D, HEADS, HEAD_DIM, GROUPS, TOKENS = 1152, 16, 72, 16, 256
LAYERS = 10  # so many that their weights do not stay in the cache

Forms = tuple[Callable[[], object], Callable[[], object]]  # plain, chosen


def modulation(rows: int, dtype: torch.dtype) -> Forms:
    """adaLN's linear layer of a few rows against ``F.linear``."""
    layers = [ModulationLinear(D, 6 * D, dtype=dtype).requires_grad_(False) for _ in range(LAYERS)]
    x = torch.randn(rows, D, dtype=dtype)
    return (
        lambda: [F.linear(x, layer.weight, layer.bias) for layer in layers],
        lambda: [layer(x) for layer in layers],
    )


def attention(batch: int, heads: int, tokens: int = TOKENS) -> Forms:
    """Attention in bfloat16 by its products against PyTorch's fused kernel."""
    q, k, v = torch.randn(3, batch, heads, tokens, HEAD_DIM).bfloat16().unbind()
    return (
        lambda: F.scaled_dot_product_attention(q, k, v),
        lambda: self_attention(q, k, v),
    )


def product(tokens: int, width: int, activated: bool, dtype: torch.dtype) -> Forms:
    """A layer, with GELU where asked for, as the engine runs it against BLAS and GELU after it."""
    layers = [nn.Linear(D, width, dtype=dtype).requires_grad_(False) for _ in range(LAYERS)]
    x, act, room = torch.randn(tokens, D, dtype=dtype), nn.GELU("tanh") if activated else None, Workspace()
    out = torch.empty(tokens, width, dtype=dtype)

    def plain() -> None:
        for layer in layers:
            torch.addmm(layer.bias, x, layer.weight.t(), out=out)
            if activated:
                torch.ops.aten.gelu.out(out, approximate="tanh", out=out)

    def chosen() -> None:
        for layer in layers:
            room.restart()
            linear(x, (layer.weight, layer.bias), room, act)

    return plain, chosen


def packing(dtype: torch.dtype, changed: int) -> Forms:
    """Half of an MLP's weights in slots, ``changed`` of the groups new, against all rows and columns."""
    layers = (nn.Linear(D, 4 * D, dtype=dtype), nn.Linear(4 * D, D, dtype=dtype))
    fc1, fc2 = (layer.requires_grad_(False) for layer in layers)
    units, masks = 4 * D // GROUPS, [np.arange(GROUPS // 2), np.arange(GROUPS // 2)]
    masks[1][:changed] += GROUPS // 2
    rows = torch.from_numpy((masks[0][:, None] * units + np.arange(units)).ravel())
    slots, orders = mlp_slots(MlpParts(fc1, nn.Identity(), fc2), GROUPS, GROUPS // 2), cycle(masks)
    return (
        lambda: [fc1.weight.index_select(0, rows), fc2.weight.index_select(1, rows)],
        lambda: slots.fill(next(orders))[1],
    )


def columns(tokens: int, dtype: torch.dtype) -> Forms:
    """fc2 of half of the groups as slots hold its columns, against transposed ones."""
    fc1, fc2 = (nn.Linear(*sizes, dtype=dtype) for sizes in ((D, 4 * D), (4 * D, D)))
    packed, _ = mlp_slots(MlpParts(fc1, nn.Identity(), fc2), GROUPS, GROUPS // 2).fill(np.arange(GROUPS // 2))
    (weight, bias), x = packed.fc2, torch.randn(tokens, 2 * D, dtype=dtype)
    transposed = weight.t().contiguous().t()
    return lambda: F.linear(x, transposed, bias), lambda: F.linear(x, weight, bias)


def cases() -> Iterator[tuple[str, Forms]]:
    """What is measured."""
    dtypes = {name: DTYPES[name] for name in ("fp32", "bf16")}
    for name, dtype in dtypes.items():
        for rows in (2, 4, 8):
            yield f"adaLN's layer, {rows} rows, {name}", modulation(rows, dtype)
    for name, dtype in dtypes.items():
        for tokens in (320, 1280):
            yield f"fc1 and GELU, {tokens} tokens, {name}", product(tokens, 5 * D // 2, True, dtype)
        for tokens in (512, 2048):
            yield f"qkv, {tokens} tokens, {name}", product(tokens, 2 * D, False, dtype)
    for name in ("bf16", "fp16"):
        yield f"fc2 of 8 groups, 320 tokens, {name}", columns(320, DTYPES[name])
    for batch in (2, 8):
        for heads in (HEADS, HEADS // 2):
            yield f"attention, batch {batch}, {heads} heads, bf16", attention(batch, heads)
    for heads in (HEADS, HEADS // 2):
        yield f"attention, 1,024 tokens, batch 2, {heads} heads, bf16", attention(2, heads, 1024)
    for name, dtype in dtypes.items():
        for changed in (GROUPS // 2, 1):
            yield f"an MLP's slots, {changed} of {GROUPS // 2} groups new, {name}", packing(dtype, changed)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, (plain, chosen) in cases():
        if isinstance(expected := plain(), Tensor):
            torch.testing.assert_close(chosen(), expected, rtol=0, atol=0.05)
        ms = measure_interleaved({"plain": plain, "chosen": chosen}, options.rounds)
        times = paired_speedup(ms["plain"], ms["chosen"])
        print(f"{name:52s} {times.median:.2f} ({times.low:.2f} to {times.high:.2f})")


if __name__ == "__main__":
    main()
