"""Slices of a whole schedule: whether they all fit, and preparing them in advance."""

from __future__ import annotations

import pytest
import torch
from core_builders import TIMESTEPS, relative_error, small_dydit, small_inputs

from dydit.export.schedule import SubnetSchedule
from dydit.runtime.engine import SubnetEngine
from dydit.runtime.packing import block_bytes
from dydit.runtime.packs import SchedulePacks

CPU = torch.device("cpu")


def packs(budget: int | None = None) -> SchedulePacks:
    model = small_dydit()
    blocks = model.adapter.blocks(model.backbone)
    weights = [(model.adapter.attention(block), model.adapter.mlp(block)) for block in blocks]
    return SchedulePacks(weights, SubnetSchedule.from_model(model, TIMESTEPS), budget)


def test_all_fit_says_whether_anything_will_be_dropped() -> None:
    plenty = packs(10**9)
    assert plenty.all_fit
    for position in range(len(TIMESTEPS)):
        for block in range(2):
            plenty.get(position, block)
    needed = plenty.statistics().bytes
    assert plenty.statistics().evictions == 0
    assert packs(needed).all_fit and not packs(needed - 1).all_fit


def test_the_default_budget_is_one_more_copy_of_the_blocks() -> None:
    model = small_dydit()
    blocks = model.adapter.blocks(model.backbone)
    copy = sum(block_bytes(model.adapter.attention(b), model.adapter.mlp(b)) for b in blocks)
    found = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS))
    assert found._packs._cache.budget == copy


def test_on_the_cpu_nothing_is_prepared() -> None:
    found = packs()
    found.prepare_next(0, CPU)
    found.join(CPU)
    assert found.statistics().misses == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams and graphs are its own")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("budget", [None, 10**9])
def test_on_a_gpu_the_engine_computes_the_same(compile: bool, budget: int | None) -> None:
    model = small_dydit().cuda()
    capacities = torch.randint(0, model.shape.tokens, (len(TIMESTEPS), model.shape.depth)).numpy()
    schedule = SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities)
    plain = SubnetEngine(model, schedule, mode="capacity")
    engine = SubnetEngine(model, schedule, mode="capacity", compile=compile, memory_budget=budget)
    x, y = (tensor.cuda() for tensor in small_inputs(model.shape))
    for _ in range(3):
        for t in TIMESTEPS:
            assert relative_error(engine(x, t, y), plain(x, t, y)) < 1e-4
    assert engine.pack_statistics().hits > 0
