"""A timestep's subnetwork as a network of its own: in mode capacity it is one graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from core_builders import TIMESTEPS, relative_error, route_tokens, small_dydit, small_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from dydit.config import DyDiTConfig
from dydit.errors import ScheduleError
from dydit.export.schedule import SubnetSchedule
from dydit.runtime.engine import Mode, SubnetEngine
from dydit.shapes import CONDITIONINGS


def make_engine(conditioning: str = "adaln_zero", mode: Mode = "capacity") -> SubnetEngine:
    model = small_dydit(config=DyDiTConfig(mlp_groups=8, token_router_ratio=4), conditioning=conditioning)
    x, y = small_inputs(model.shape)
    route_tokens(model, x, TIMESTEPS[0], y)
    N = model.shape.tokens
    capacities = np.array([[N // 2, N], [0, 3], [5, 1]])
    return SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities), mode=mode)


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_the_engine_does(mode: Mode, dtype: torch.dtype) -> None:
    engine = make_engine(mode=mode)
    engine = SubnetEngine(engine.model, engine.schedule, dtype, mode=mode)
    x, y = small_inputs(engine.shape)
    subnetworks = [engine.subnetwork(t) for t in TIMESTEPS]
    for t, subnetwork in zip(TIMESTEPS, subnetworks, strict=True):
        found = subnetwork(x.to(dtype), y)
        assert relative_error(found.float(), engine(x.to(dtype), t, y).float()) < 1e-5
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
    """For any number of samples; the file holds what the subnetwork needs and no other weights."""
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
    names = {"qkv", "fc1"}  # whole layers would be buffers of the backbone
    assert not any(name in key for key in program.state_dict for name in names)


def test_another_timestep_is_refused() -> None:
    with pytest.raises(ScheduleError, match="timestep 3; expected one of the schedule's 3"):
        make_engine().subnetwork(3.0)
