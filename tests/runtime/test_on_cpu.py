"""The form of the blocks for a CPU against the form for anything else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from core_builders import (
    TIMESTEPS,
    multiply_in_one_kernel,
    relative_error,
    route_tokens,
    small_dydit,
    small_inputs,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dydit.compute.engine import count_engine, record_token_logits
from dydit.config import DyDiTConfig
from dydit.export.schedule import SubnetSchedule
from dydit.processor import HAS_AMX
from dydit.runtime.engine import Mode, SubnetEngine
from dydit.runtime.on_cpu import _function_of, _put_rows
from dydit.shapes import CONDITIONINGS

LINEAR = torch.ops.mkldnn._linear_pointwise
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def linear_flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Two for each multiply-add."""
    return 2 * math.prod(x_shape) * weight_shape[0]


def attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the two products."""
    return 2 * math.prod(q) * k[2] + 2 * math.prod(q[:3]) * math.prod(v[2:])


def routed(
    conditioning: str, mode: Mode, dtype: torch.dtype = torch.float32, batch: int = 3
) -> tuple[SubnetEngine, Tensor, Tensor]:
    """An engine whose blocks keep no token, some or all; latents and conditions."""
    model = small_dydit(config=DyDiTConfig(mlp_groups=8, token_router_ratio=4), conditioning=conditioning)
    x, y = small_inputs(model.shape, batch)
    route_tokens(model, x, TIMESTEPS[0], y)
    N = model.shape.tokens
    capacities = np.array([[N // 2, N], [0, 3], [5, 1]])
    schedule = SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities)
    y = y.to(dtype) if y.is_floating_point() else y
    return SubnetEngine(model, schedule, dtype, mode=mode), x.to(dtype), y


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "one_kernel", "tolerance"),
    [(torch.float32, True, 1e-5), (torch.float32, False, 1e-5), (torch.bfloat16, HAS_AMX, 3e-2)],
)
def test_both_forms_compute_the_same(
    conditioning: str,
    mode: Mode,
    batch: int,
    dtype: torch.dtype,
    one_kernel: bool,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float32 also with oneDNN's products, on any CPU; in bfloat16 the MLP's batches are filled up."""
    multiply_in_one_kernel(monkeypatch, frozenset({dtype} if one_kernel else ()))
    engine, x, y = routed(conditioning, mode, dtype, batch)
    for t in TIMESTEPS:
        with record_token_logits(engine) as on_cpu:
            found = engine(x, t, y)
        with monkeypatch.context() as context, record_token_logits(engine) as anywhere:
            context.setattr(engine, "_is_on_cpu", lambda _: False)
            expected = engine(x, t, y)
        assert relative_error(found.float(), expected.float()) < tolerance
        assert on_cpu.keys() == anywhere.keys()
        for block, logits in on_cpu.items():
            assert relative_error(logits.float(), anywhere[block].float()) < tolerance


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("one_kernel", [True, False])
def test_it_executes_what_fvcore_counts(
    conditioning: str, mode: Mode, one_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own counter sees the products that run; fvcore those of the other form, and the norms."""
    multiply_in_one_kernel(monkeypatch, frozenset({torch.float32} if one_kernel else ()))
    engine, x, y = routed(conditioning, mode)
    rules = {LINEAR: linear_flops, ATTENTION: attention_flops}
    for t in TIMESTEPS:
        counted = count_engine(engine, x, t, y).counted
        with FlopCounterMode(display=False, custom_mapping=rules) as executed:
            engine(x, t, y)
        assert executed.get_total_flops() == 2 * (counted.total - counted.by_op["layer_norm"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [1, 4, 36, 40])
@pytest.mark.parametrize("start", [0, 1, 16])
def test_rows_keep_their_bits_whatever_they_are_copied_as(dtype: torch.dtype, width: int, start: int) -> None:
    rows, memory = torch.randn(5, width).to(dtype), torch.zeros(start + 7 * width, dtype=dtype)
    rows[0, 0], rows[1, 0] = torch.nan, -0.0
    target, places = memory[start:].view(7, width), torch.tensor([6, 0, 3, 1, 5])
    _put_rows(target, places, rows)
    assert target[places].view(torch.uint8).equal(rows.view(torch.uint8))
    assert not target[[2, 4]].any()


@torch.no_grad()
@pytest.mark.parametrize("norm", [nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(8), nn.RMSNorm(8)])
def test_a_norm_as_a_function(norm: nn.Module) -> None:
    x = torch.randn(3, 8)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    assert torch.equal(_function_of(norm)(x), norm(x))
