"""Half precision against fp32: the same subnetworks, outputs within what the format can tell apart."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from core_builders import TIMESTEPS, multiply_in_one_kernel, relative_error, small_dydit, small_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dydit.dynamic.dydit import DyDiT
from dydit.export.schedule import SubnetSchedule
from dydit.processor import WITHOUT_ONEDNN
from dydit.runtime import layers
from dydit.runtime.engine import Mode, SubnetEngine
from dydit.runtime.layers import self_attention
from dydit.runtime.sliced import MANY, filled_up
from dydit.runtime.workspace import Workspace
from dydit.shapes import CONDITIONINGS

# Errors of a few roundings of 8 and 11 bits each, relative to the largest output.
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


def routed(conditioning: str) -> tuple[DyDiT, SubnetSchedule, Tensor, Tensor]:
    """A model, its schedule, and one sample per timestep.

    On these samples the token scores keep a gap, and the capacities cut in it, so that rounding does not
    decide which tokens are kept.
    """
    model = small_dydit(3, conditioning=conditioning)
    x, y = small_inputs(model.shape, batch=len(TIMESTEPS), seed=3)
    _, routing = model(x, torch.tensor(TIMESTEPS), y, return_routing=True)
    capacities = routing.tokens.sum(-1).int().numpy()  # (S, L)
    return model, SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities), x, y


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_engine_in_half_precision_agrees_with_fp32(
    conditioning: str, dtype: torch.dtype, mode: Mode
) -> None:
    model, schedule, x, y = routed(conditioning)
    t = torch.tensor(TIMESTEPS)
    full = SubnetEngine(model, schedule, mode=mode)(x, t, y)
    y = y.to(dtype) if y.is_floating_point() else y
    half = SubnetEngine(model, schedule, dtype=dtype, mode=mode)(x.to(dtype), t, y)
    assert half.dtype == dtype and relative_error(half.float(), full) < TOLERANCES[dtype]


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_sliced_equals_masked_in_half_precision(dtype: torch.dtype, mode: Mode) -> None:
    model, schedule, x, y = routed("adaln_zero")
    half = nn.Module.to(model, dtype)
    engine = SubnetEngine(half, schedule, verify=False, mode=mode)
    assert schedule.capacities is not None
    for i, t in enumerate(TIMESTEPS):
        sample = x[i : i + 1].to(dtype), t, y[i : i + 1]
        masked = half(*sample, capacities=schedule.capacities[i].tolist() if mode == "capacity" else None)
        assert relative_error(engine(*sample).float(), masked.float()) < TOLERANCES[dtype]


@given(st.integers(0, 10**6), st.sampled_from([8, 16]))
def test_few_sizes_and_little_in_vain(count: int, sizes: int) -> None:
    computed = filled_up(count, sizes)
    most_in_vain = count / (sizes if count <= MANY else sizes // 2)
    assert computed % 16 == 0 and count <= computed < count + max(16, most_in_vain)
    assert filled_up(computed, sizes) == computed


@pytest.mark.parametrize("sizes", [8, 16])
def test_an_octave_has_few_sizes(sizes: int) -> None:
    for low in (256, 512, 1024, 4096):
        computed = {filled_up(count, sizes) for count in range(low + 1, 2 * low + 1)}
        assert len(computed) == (sizes if low < MANY else sizes // 2)


@pytest.mark.parametrize("act", [nn.GELU("none"), nn.GELU("tanh"), nn.ReLU(), nn.SiLU(), None], ids=str)
@pytest.mark.parametrize("rows", [1, 48, 513])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_products_in_one_kernel_or_in_several(
    dtype: torch.dtype, tolerance: float, rows: int, act: nn.Module | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype in WITHOUT_ONEDNN:  # no engine takes its kernels there
        pytest.skip(f"oneDNN has no products in {dtype} for this processor")
    torch.manual_seed(0)
    wide = torch.randn(24, 96, dtype=dtype)
    weights = (wide.contiguous(), wide.t().contiguous().t(), wide[4:12], wide[:, 8:40])
    room = Workspace()
    for weight, bias in product(weights, (None, torch.randn(24, dtype=dtype))):
        x = torch.randn(2, rows, weight.shape[1], dtype=dtype)
        layer = (weight, None if bias is None else bias[: len(weight)])
        for precisions in (frozenset(), frozenset({dtype})):
            multiply_in_one_kernel(monkeypatch, precisions)
            room.restart()
            found = layers.linear(x, layer, room, act)
            expected = layers.linear(x, layer, None, act)
            assert found.dtype == dtype and found.shape == expected.shape
            assert relative_error(found.float(), expected.float()) < tolerance


def test_which_products_are_in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 2, 96).bfloat16(), torch.randn(24, 96).bfloat16()
    multiply_in_one_kernel(monkeypatch, frozenset({torch.bfloat16}))
    assert layers.in_one_kernel(x, weight) and layers.in_one_kernel(x, weight.t().contiguous().t())
    assert not layers.in_one_kernel(x[..., :8], weight[:, :8])
    assert not layers.in_one_kernel(x.float(), weight.float())
    multiply_in_one_kernel(monkeypatch, frozenset({torch.float32}))
    assert layers.in_one_kernel(x.float(), weight.float()) and not layers.in_one_kernel(x, weight)
    monkeypatch.setattr(layers, "ACTIVATED_IN_ONE_KERNEL", frozenset({torch.bfloat16}))
    assert layers.in_one_kernel(x, weight, activated=True) and not layers.in_one_kernel(x, weight)


@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_no_kernel_is_made_for_every_number_of_kept_tokens(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where nothing is filled up, the MLP of kept tokens is multiplied by BLAS."""
    multiply_in_one_kernel(monkeypatch, frozenset({torch.float32}))
    sizes, kernel = set[int](), layers.in_one_kernel

    def seen(x: Tensor, weight: Tensor, activated: bool) -> bool:
        sizes.add(x.shape[:-1].numel())
        return kernel(x, weight, activated)

    monkeypatch.setattr(layers, "in_one_kernel", seen)
    model, schedule, x, y = routed("adaln_zero")
    assert schedule.capacities is not None
    whole, kept = model.shape.tokens, set(schedule.capacities.flatten().tolist())
    engine = SubnetEngine(model, schedule, mode=mode)
    for i, t in enumerate(TIMESTEPS):
        engine(x[i : i + 1], t, y[i : i + 1])
    assert sizes == {whole} and kept - {0, whole}


@pytest.mark.parametrize("scores", [0, 256, 3 * 256, 10**6])  # none, 1, 3 and all heads at a time
@pytest.mark.parametrize("dtype", [torch.float32, *TOLERANCES])
def test_attention_in_products_or_in_one_kernel(
    dtype: torch.dtype, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "SCORES", scores)
    monkeypatch.setattr(layers, "HAS_AMX", False)
    monkeypatch.setattr(layers, "HAS_BF16", True)
    projected = torch.randn(2, 16, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = projected.permute(3, 0, 2, 1, 4)  # as the engine has them: parts of one layer's output
    expected = F.scaled_dot_product_attention(q, k, v)
    room = Workspace()
    for workspace in (None, room, room):  # the first time it has no memory yet
        room.restart()
        found = self_attention(q.to(dtype), k.to(dtype), v.to(dtype), workspace)
        assert found.dtype == dtype and relative_error(found.float(), expected) < TOLERANCES.get(dtype, 1e-6)


@pytest.mark.parametrize(("has_bf16", "has_amx"), [(False, False), (True, True)])
def test_attention_is_pytorchs_where_products_in_bfloat16_are_slower(
    has_bf16: bool, has_amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "HAS_BF16", has_bf16)
    monkeypatch.setattr(layers, "HAS_AMX", has_amx)
    q, k, v = torch.randn(3, 2, 4, 16, 8).bfloat16()
    assert torch.equal(self_attention(q, k, v, Workspace()), F.scaled_dot_product_attention(q, k, v))
