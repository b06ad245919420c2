"""A timestep's subnetwork as a network of its own: in mode capacity it is one graph."""

from __future__ import annotations

import re
from pathlib import Path

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
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from dydit.config import DyDiTConfig
from dydit.errors import ConfigError, ScheduleError, ShapeError
from dydit.export.schedule import SubnetSchedule
from dydit.processor import HAS_AMX, IN_ONE_KERNEL
from dydit.runtime import layers
from dydit.runtime.engine import Mode, SubnetEngine
from dydit.runtime.packing import block_bytes
from dydit.shapes import CONDITIONINGS


def make_engine(conditioning: str = "adaln_zero", mode: Mode = "capacity") -> SubnetEngine:
    model = small_dydit(config=DyDiTConfig(mlp_groups=8, token_router_ratio=4), conditioning=conditioning)
    x, y = small_inputs(model.shape)
    route_tokens(model, x, TIMESTEPS[0], y)
    N = model.shape.tokens
    capacities = np.array([[N // 2, N], [0, 3], [5, 1]])
    return SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities), mode=mode)


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize(
    ("dtype", "has_amx", "tolerance"),
    [
        (torch.float32, HAS_AMX, 1e-5),
        (torch.bfloat16, False, 1e-5),
        (torch.bfloat16, HAS_AMX, 3e-2),  # GELU's input is not rounded in the engine's product
    ],
)
def test_it_computes_what_the_engine_does(
    mode: Mode, dtype: torch.dtype, has_amx: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "HAS_AMX", has_amx)
    monkeypatch.setattr(layers, "HAS_BF16", True)
    multiply_in_one_kernel(monkeypatch, IN_ONE_KERNEL if has_amx else IN_ONE_KERNEL - {torch.bfloat16})
    engine = make_engine(mode=mode)
    engine = SubnetEngine(engine.model, engine.schedule, dtype, mode=mode)
    x, y = small_inputs(engine.shape)
    subnetworks = [engine.subnetwork(t) for t in TIMESTEPS]
    for t, subnetwork in zip(TIMESTEPS, subnetworks, strict=True):
        found = subnetwork(x.to(dtype), y)
        assert relative_error(found.float(), engine(x.to(dtype), t, y).float()) < tolerance
        assert not list(subnetwork.parameters()) and subnetwork.timestep == t
    assert engine.pack_statistics().bytes <= engine._packs._cache.budget


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_torch_compile_takes_it_as_one_graph(conditioning: str) -> None:
    engine = make_engine(conditioning)
    x, y = small_inputs(engine.shape)
    for t in TIMESTEPS:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(engine.subnetwork(t), backend=counter, fullgraph=True)
        assert relative_error(compiled(x, y), engine(x, t, y)) < 1e-5
        assert counter.frame_count == 1


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_torch_export_takes_it_as_one_program(conditioning: str, tmp_path: Path) -> None:
    """For any number of samples."""
    engine = make_engine(conditioning)
    x, y = small_inputs(engine.shape)
    t = TIMESTEPS[2]
    batch = {0: Dim("batch", min=2, max=64)}
    program = torch.export.export(engine.subnetwork(t), (x, y), dynamic_shapes={"x": batch, "y": batch})
    torch.export.save(program, tmp_path / "subnetwork.pt2")
    loaded = torch.export.load(tmp_path / "subnetwork.pt2").module()
    for count in (2, 5):
        x, y = small_inputs(engine.shape, batch=count)
        assert relative_error(loaded(x, y), engine(x, t, y)) < 1e-5


def test_an_exported_file_holds_no_other_weights(tmp_path: Path) -> None:
    """Also where slices are views: a tensor is saved with all of the memory that it is a view of."""
    model = small_dydit(config=DyDiTConfig(nested=True, token_router_ratio=4), hidden_size=128)
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS))
    x, y = small_inputs(model.shape)
    subnetwork = engine.subnetwork(TIMESTEPS[0])
    packed = [part.packed for part in subnetwork._parts[1]]
    tensors = [
        t for p in packed for pair in (*p.qkv, p.out, p.fc1, p.fc2) if pair for t in pair if t is not None
    ]
    cut = sum(t.nbytes for t in tensors)
    blocks = [(model.adapter.attention(b), model.adapter.mlp(b)) for b in model.backbone.blocks]
    whole = sum(block_bytes(*parts) for parts in blocks)
    assert cut < 0.8 * whole
    assert sum(t.untyped_storage().nbytes() for t in tensors) == cut
    assert relative_error(subnetwork(x, y), engine(x, TIMESTEPS[0], y)) < 1e-5


def test_it_stays_where_the_engine_is() -> None:
    with pytest.raises(ConfigError, match="a subnetwork to move or convert; .*; move the engine"):
        make_engine().subnetwork(TIMESTEPS[0]).double()


def test_torch_export_of_a_whole_engine_is_refused() -> None:
    engine = make_engine()
    x, y = small_inputs(engine.shape)
    with pytest.raises(Exception, match=r"an engine in torch.export; .*; export engine.subnetwork"):
        torch.export.export(engine, (x, torch.tensor(TIMESTEPS[0]), y))
    assert relative_error(engine(x, TIMESTEPS[0], y), make_engine()(x, TIMESTEPS[0], y)) < 1e-6


def test_torch_compile_of_a_whole_engine_runs_it_as_it_is() -> None:
    engine = make_engine()
    x, y = small_inputs(engine.shape)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(engine, backend=counter)
    for t in TIMESTEPS * 2:
        assert torch.equal(compiled(x, t, y), engine(x, t, y))
    assert counter.frame_count == 0


def test_another_timestep_is_refused() -> None:
    with pytest.raises(ScheduleError, match="timestep 3; expected one of the schedule's 3"):
        make_engine().subnetwork(3.0)


def test_it_refuses_what_the_engine_refuses() -> None:
    engine = make_engine()
    subnetwork, (x, y) = engine.subnetwork(TIMESTEPS[0]), small_inputs(engine.shape)
    for inputs in ((x.double(), y), (x, y.float()), (x[:0], y[:0]), (x[..., :4], y)):
        with pytest.raises(ShapeError) as told:
            engine(inputs[0], TIMESTEPS[0], inputs[1])
        with pytest.raises(ShapeError, match=re.escape(str(told.value))):
            subnetwork(*inputs)
