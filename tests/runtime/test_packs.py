"""Slices of a whole schedule: whether they all fit, and preparing them in advance."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from core_builders import (
    TIMESTEPS,
    random_masks,
    relative_error,
    route_widths,
    small_dydit,
    small_inputs,
)
from cuda_stand_ins import stand_in_for_streams
from torch import nn

from dydit.config import DyDiTConfig
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ConfigError
from dydit.export.schedule import SubnetSchedule
from dydit.runtime import cache
from dydit.runtime.engine import Mode, SubnetEngine
from dydit.runtime.packing import block_bytes, group_bytes, head_bytes
from dydit.runtime.packs import SchedulePacks

CPU = torch.device("cpu")


def packs(
    budget: int | None = None, model: DyDiT | None = None, steps: Sequence[float] = TIMESTEPS
) -> SchedulePacks:
    model = model or small_dydit()
    blocks = model.adapter.blocks(model.backbone)
    weights = [(model.adapter.attention(block), model.adapter.mlp(block)) for block in blocks]
    return SchedulePacks(weights, SubnetSchedule.from_model(model, steps), budget)


def use(found: SchedulePacks, position: int) -> None:
    for block in range(2):
        with found.use(position, block):
            pass


def use_all(found: SchedulePacks) -> None:
    for position in range(len(TIMESTEPS)):
        use(found, position)


def test_all_fit_says_whether_anything_will_be_dropped() -> None:
    plenty = packs(10**9)
    assert plenty.all_fit
    use_all(plenty)
    needed = plenty.statistics().bytes
    assert plenty.statistics().evictions == 0 and plenty.statistics().copied == needed
    assert packs(needed).all_fit and not packs(needed - 1).all_fit
    enough = packs(needed)
    use_all(enough)
    assert enough.statistics().evictions == 0 and enough.statistics().bytes == needed
    use_all(enough)
    assert enough.statistics().copied == needed


def test_where_not_all_fits_a_block_has_room_for_its_largest_masks() -> None:
    plenty = packs(10**9)
    use_all(plenty)
    needed = plenty.statistics()
    found = packs(needed.bytes - 1)
    use_all(found)
    once = found.statistics()
    assert once.bytes < needed.bytes and once.copied < needed.copied  # what two masks share stays
    use_all(found)
    assert found.statistics().bytes == once.bytes and found.statistics().evictions > 0


def test_views_take_no_memory() -> None:
    model = small_dydit(config=DyDiTConfig(nested=True, token_router_ratio=4))
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS), memory_budget=math.inf)
    x, y = small_inputs(model.shape)
    for t in TIMESTEPS:
        engine(x, t, y)
    found = engine.pack_statistics()
    assert (found.bytes, found.copied) == (0, 0) and found.views == found.misses > 0


def test_the_default_budget_is_one_more_copy_of_the_blocks() -> None:
    model = small_dydit()
    blocks = model.adapter.blocks(model.backbone)
    copy = sum(block_bytes(model.adapter.attention(b), model.adapter.mlp(b)) for b in blocks)
    found = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS))
    assert found._packs._cache.budget == copy


def test_timesteps_share_what_has_the_same_mask() -> None:
    found = packs()
    alone = [found.bytes_at(position) for position in range(len(TIMESTEPS))]
    assert found.bytes_at(0, 0) == alone[0]
    assert max(alone) <= found.bytes_at(*range(len(TIMESTEPS))) <= sum(alone)
    assert found.statistics().schedule_bytes == found.bytes_at(*range(len(TIMESTEPS)))
    assert found.statistics().misses == 0  # to tell makes nothing


def test_slots_go_before_others_take_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a budget of one block, in an engine's run: no name may hold the slices of the block before."""
    model = small_dydit()
    blocks = model.adapter.blocks(model.backbone)
    budget = max(block_bytes(model.adapter.attention(b), model.adapter.mlp(b)) for b in blocks)
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS), memory_budget=budget)
    make, made = cache.PackCache._fill, weakref.WeakKeyDictionary[Any, int]()  # slots -> bytes

    def watched(self: cache.PackCache, entry: Any, cut: Any) -> None:
        made[entry.slots] = cut.size
        most.append(sum(made.values()))
        make(self, entry, cut)

    most: list[int] = []
    monkeypatch.setattr(cache.PackCache, "_fill", watched)
    x, y = small_inputs(model.shape)
    for t in TIMESTEPS * 2:
        engine(x, t, y)
    assert budget / 2 < max(most) <= budget and engine.pack_statistics().evictions > 0


def prepare_next(found: SchedulePacks, position: int, device: torch.device) -> None:
    """Run a timestep, and prepare the next beside it."""
    with found.preparing_next(position, device):
        use(found, position)


def test_on_the_cpu_nothing_is_prepared() -> None:
    found, alone = packs(), packs()
    prepare_next(found, 0, CPU)
    use(alone, 0)
    assert found.statistics() == alone.statistics()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device whose streams do all work at once; where not all fits, each mask has slots of its own."""
    stand_in_for_streams(monkeypatch)
    measure = SchedulePacks.measure

    def as_on_a_gpu(self: SchedulePacks) -> None:
        measure(self)
        self._one_for_all = False

    monkeypatch.setattr(SchedulePacks, "measure", as_on_a_gpu)
    return torch.device("cuda")


def test_the_next_timestep_is_prepared_beside_this_one(gpu: torch.device) -> None:
    found = packs(10**9)
    prepare_next(found, 0, gpu)
    prepared = found.statistics()
    assert (prepared.misses, prepared.hits) == (4, 0)
    use(found, 1)
    assert found.statistics().misses == prepared.misses


def test_nothing_comes_after_the_last_timestep(gpu: torch.device) -> None:
    found = packs(10**9)
    prepare_next(found, len(TIMESTEPS) - 1, gpu)
    assert found.statistics().misses == 2


def test_what_two_timesteps_cannot_share_is_not_prepared(gpu: torch.device) -> None:
    needed = packs(10**9).bytes_at(0, 1)
    found, enough = packs(needed - 1), packs(needed)
    for tried in (found, enough):
        prepare_next(tried, 0, gpu)
    assert (found.statistics().misses, enough.statistics().misses) == (2, 4)


def test_to_prepare_pushes_out_nothing_that_this_timestep_needs(gpu: torch.device) -> None:
    """At a budget of two timesteps nothing is packed but by what prepares it."""
    steps = [float(t) for t in range(950, 0, -100)]
    model = small_dydit(mixed=False)
    route_widths(model, steps, *random_masks(0, len(steps), model.shape))
    plenty = packs(10**9, model, steps)
    found = packs(max(plenty.bytes_at(i, i + 1) for i in range(len(steps) - 1)), model, steps)
    assert not found.all_fit
    for position in range(len(steps)):  # those of the first are views
        before = found.statistics().copied
        with found.preparing_next(position, gpu):
            use(found, position)
            assert found.statistics().copied == before
    assert found.statistics().copied > 0 and found.statistics().evictions > 0


def test_what_is_there_for_good_is_not_looked_for_again(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, looked_up = packs(10**9), list[tuple[int, int]]()
    for position in range(len(TIMESTEPS)):
        prepare_next(found, position, gpu)
    parts = found._parts
    monkeypatch.setattr(found, "_parts", lambda *key: looked_up.append(key) or parts(*key))
    prepare_next(found, 0, gpu)
    assert looked_up == [(0, 0), (0, 1)]
    found.forget()
    looked_up.clear()
    prepare_next(found, 0, gpu)
    assert looked_up == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_heads_and_groups_are_packed_once_per_mask_of_their_own() -> None:
    """Two masks of heads by two of groups are four subnetworks, and four slices, not eight."""
    model = small_dydit()
    schedule = SubnetSchedule.from_model(model, TIMESTEPS)
    H, G, L = model.shape.num_heads, model.shape.mlp_groups, model.shape.depth
    pairs = [(heads, groups) for heads in (0, 1) for groups in (0, 1)]
    head_masks, group_masks = np.ones((2, H), bool), np.ones((2, G), bool)
    head_masks[0, 1] = head_masks[1, 2] = group_masks[0, 1] = group_masks[1, 2] = False
    crossed = replace(
        schedule,
        timesteps=(4.0, 3.0, 2.0, 1.0),
        head_rows=np.stack([head_masks[h] for h, _ in pairs]),
        group_rows=np.stack([group_masks[g] for _, g in pairs]),
        rows=np.repeat(np.arange(4, dtype=np.int32)[:, None], L, axis=1),
    )
    engine = SubnetEngine(model, crossed, memory_budget=10**9)
    part = model.backbone.blocks[0]
    head, group = (
        head_bytes(model.adapter.attention(part)),
        group_bytes(model.adapter.mlp(part), G),
    )
    x, y = small_inputs(model.shape)
    for t in crossed.timesteps:
        engine(x, t, y)
    found = engine.pack_statistics()
    assert (found.misses, found.hits) == (3 * L, L)  # the fourth pair is made of what is there
    assert found.bytes == found.copied == 2 * L * ((H - 1) * head + (G - 1) * group)


def test_a_conversion_measures_the_slices_anew() -> None:
    model = nn.Module.to(small_dydit(), torch.bfloat16)
    blocks = model.adapter.blocks(model.backbone)
    block = max(block_bytes(model.adapter.attention(b), model.adapter.mlp(b)) for b in blocks)
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS), memory_budget=2 * block)
    x, y = small_inputs(model.shape)
    engine(x.bfloat16(), TIMESTEPS[0], y)
    engine.float()
    for t in TIMESTEPS:
        engine(x, t, y)
        assert engine.pack_statistics().bytes <= 2 * block
    assert engine.computed_tokens(5) == 5
    with pytest.raises(ConfigError, match="memory budget"):
        engine.double()
    with pytest.raises(ConfigError, match="memory budget"):  # nor does it wait for memory that never comes
        for t in TIMESTEPS:
            engine(x.double(), t, y)
    engine.float()(x, TIMESTEPS[0], y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams and graphs are its own")
@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("budget", [None, 10**9])
def test_on_a_gpu_the_engine_computes_the_same(mode: Mode, compile: bool, budget: int | None) -> None:
    model = small_dydit().cuda()
    capacities = torch.randint(0, model.shape.tokens, (len(TIMESTEPS), model.shape.depth)).numpy()
    schedule = SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities)
    masked = [{} if mode == "exact" else {"capacities": row.tolist()} for row in capacities]
    engine = SubnetEngine(model, schedule, mode=mode, compile=compile, memory_budget=budget)
    for batch in (2, 3, 2):
        x, y = (tensor.cuda() for tensor in small_inputs(model.shape, batch))
        for _ in range(3):
            for t, options in zip(TIMESTEPS, masked, strict=True):
                expected = model(x, torch.full((batch,), t, device="cuda"), y, **options)
                assert relative_error(engine(x, t, y), expected) < 1e-4
    assert engine.records == (compile and mode == "capacity" and engine._packs.all_fit)
    # What was recorded, whoever calls it: in inference mode, on another stream, under autocast (unrecorded).
    (x, y), options = (tensor.cuda() for tensor in small_inputs(model.shape)), masked[0]
    expected = model(x, torch.full((len(x),), TIMESTEPS[0], device="cuda"), y, **options)
    with torch.inference_mode():
        assert relative_error(engine(x, TIMESTEPS[0], y), expected) < 1e-4
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert relative_error(engine(x, TIMESTEPS[0], y), expected) < 1e-4
    with torch.autocast("cuda", torch.bfloat16):
        assert relative_error(engine(x, TIMESTEPS[0], y), expected) < 0.1
    assert relative_error(engine(x, TIMESTEPS[0], y), expected) < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams and graphs are its own")
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_threads_share_an_engine(compile: bool) -> None:
    model = small_dydit().cuda()
    capacities = np.full((len(TIMESTEPS), model.shape.depth), model.shape.tokens // 2)
    schedule = SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities)
    alone, shared = (SubnetEngine(model, schedule, mode="capacity", compile=compile) for _ in range(2))
    calls = [(seed, t) for seed in range(4) for t in TIMESTEPS] * 3

    def run(engine: SubnetEngine, seed: int, t: float) -> torch.Tensor:
        x, y = (tensor.cuda() for tensor in small_inputs(model.shape, seed=seed))
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            output = engine(x, t, y)
            torch.cuda.current_stream().synchronize()
        return output

    expected = [run(alone, *call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda call: run(shared, *call), calls))
    for seen, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(seen, wanted)
