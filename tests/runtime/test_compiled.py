"""The compiled engine: the same function, from a few graphs that all timesteps and blocks share."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from core_builders import (
    multiply_in_one_kernel,
    relative_error,
    route_tokens,
    route_widths,
    small_dydit,
    small_inputs,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dydit.compute.engine import count_engine
from dydit.config import DyDiTConfig
from dydit.dynamic.dydit import DyDiT
from dydit.export.schedule import SubnetSchedule
from dydit.runtime import compiled
from dydit.runtime.engine import Mode, SubnetEngine
from dydit.shapes import CONDITIONINGS

STEPS = [float(t) for t in range(950, 0, -80)]  # 12 timesteps

# Half a minute each on a slow machine: .ci/run has one mode of two other designs, and one of the rest.
IN_CI = {"in_context": "exact", "cross_attention": "capacity"}
EXHAUSTIVE = [pytest.mark.slow, pytest.mark.exhaustive]


def marks(design: str, mode: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if IN_CI.get(design) == mode else EXHAUSTIVE


DESIGNS = [
    pytest.param(name, mode, marks=marks(name, mode))
    for name in CONDITIONINGS
    if name != "adaln_zero"  # of which the test below is
    for mode in get_args(Mode)
]


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Counts the graphs that torch.compile makes; runs them without generating code."""
    torch._dynamo.reset()
    counting = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiled.torch, "compile", partial(torch.compile, backend=counting))
    return counting


def many_subnetworks(
    conditioning: str = "adaln_zero", seed: int = 0, always_on: bool = True
) -> tuple[DyDiT, SubnetSchedule]:
    """A model whose blocks and timesteps have many widths, with capacities from none to all tokens."""
    config = DyDiTConfig(mlp_groups=8, token_router_ratio=4, always_on=always_on)
    model = small_dydit(seed, config, mixed=False, conditioning=conditioning, depth=3)
    rng = np.random.default_rng(seed)
    shape = model.shape
    open_share = rng.uniform(0, 1, (len(STEPS), shape.depth, 1))
    heads = rng.uniform(size=(len(STEPS), shape.depth, shape.num_heads)) < open_share
    groups = rng.uniform(size=(len(STEPS), shape.depth, shape.mlp_groups)) < open_share
    if always_on:
        heads[..., 0] = groups[..., 0] = True
    route_widths(model, STEPS, heads, groups)
    x, y = small_inputs(shape, batch=2)
    route_tokens(model, x, STEPS[0], y)
    capacities = rng.integers(0, shape.tokens + 1, (len(STEPS), shape.depth))
    return model, SubnetSchedule.from_model(model, STEPS, capacities=capacities)


def distinct_shapes(schedule: SubnetSchedule) -> int:
    """Distinct numbers of heads, groups and tokens among the schedule's blocks."""
    heads, groups = schedule.heads.sum(-1), schedule.groups.sum(-1)
    assert schedule.capacities is not None
    return len(np.unique(np.stack([heads, groups, schedule.capacities]).reshape(3, -1), axis=1).T)


def largest_error(a: SubnetEngine, b: SubnetEngine, steps: list[float] = STEPS, batch: int = 2) -> float:
    x, y = small_inputs(a.shape, batch=batch)
    return max(relative_error(a(x, t, y), b(x, t, y)) for t in steps)


def engines(
    conditioning: str, mode: Mode, dtype: torch.dtype | None = None
) -> tuple[SubnetEngine, SubnetEngine]:
    """Compiled and as it is, with more shapes than there may be graphs."""
    model, schedule = many_subnetworks(conditioning)
    assert distinct_shapes(schedule) > 30
    fast, eager = (SubnetEngine(model, schedule, dtype, mode=mode, compile=on) for on in (True, False))
    return fast, eager


# At the limit torch.compile would quietly go on without compiling.
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def check_few_graphs(
    counter: Any, fast: SubnetEngine, eager: SubnetEngine, batch: int = 2, most: int = 14
) -> None:
    before = counter.frame_count
    assert largest_error(fast, eager, batch=batch) < 1e-5
    first = counter.frame_count
    assert 0 < first - before <= most
    assert largest_error(fast, eager, batch=batch) < 1e-5
    assert counter.frame_count == first  # a second run through the timesteps needs no further one


@pytest.mark.parametrize(("conditioning", "mode"), DESIGNS)
def test_few_graphs_for_many_subnetworks(counter: Any, conditioning: str, mode: Mode) -> None:
    check_few_graphs(counter, *engines(conditioning, mode))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", get_args(Mode))
def test_few_graphs_for_batches_of_any_size(counter: Any, mode: Mode) -> None:
    """One of a single sample takes as many graphs again, as a size of 1 is never symbolic."""
    fast, eager = engines("adaln_zero", mode)
    for batch in (2, 1):
        check_few_graphs(counter, fast, eager, batch)
    graphs = counter.frame_count
    for batch in (5, 3):
        assert largest_error(fast, eager, batch=batch) < 1e-5
    assert counter.frame_count == graphs


@pytest.mark.slow
@pytest.mark.parametrize("mode", [pytest.param("exact", marks=pytest.mark.exhaustive), "capacity"])
def test_generated_code_computes_the_same(mode: Mode) -> None:
    torch._dynamo.reset()
    assert largest_error(*engines("adaln_zero", mode), STEPS[:2]) < 1e-5


def test_half_precision_compiles_too(counter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operations in the same precision, without a batch filled up."""
    fast, eager = engines("adaln_zero", "exact", torch.bfloat16)
    monkeypatch.setattr(eager, "_is_on_cpu", lambda _: False)  # rounds in other places
    x, y = small_inputs(fast.shape)
    for t in STEPS[:2]:
        seen, expected = fast(x.bfloat16(), t, y), eager(x.bfloat16(), t, y)
        assert seen.dtype == torch.bfloat16 and relative_error(seen.float(), expected.float()) < 1e-2
    assert counter.frame_count > 0


def test_a_compiled_engine_is_counted_like_any_other() -> None:
    model, schedule = many_subnetworks()
    x, y = small_inputs(model.shape)
    calls = [
        count_engine(SubnetEngine(model, schedule, compile=compile), x, STEPS[3], y)
        for compile in (False, True)
    ]
    assert calls[0].counted == calls[1].counted and calls[1].counted.total == calls[1].analytic.total


@pytest.mark.parametrize("mode", [pytest.param("exact", marks=EXHAUSTIVE), "capacity"])
def test_threads_share_a_compiled_engine(counter: Any, mode: Mode) -> None:
    """From the first call on, at which both compile."""
    fast, eager = engines("adaln_zero", mode)
    with ThreadPoolExecutor(2) as pool:
        errors = pool.map(lambda steps: largest_error(fast, eager, steps), (STEPS[:6], STEPS[5::-1]))
    assert max(errors) < 1e-5


@pytest.mark.slow
@pytest.mark.exhaustive
def test_few_graphs_where_no_component_is_always_on(counter: Any) -> None:
    """Attentions without a head, with q, k and v apart, in one layer, and in one by head."""
    model, schedule = many_subnetworks(always_on=False)
    fast, eager = (SubnetEngine(model, schedule, mode="capacity", compile=on) for on in (True, False))
    check_few_graphs(counter, fast, eager, most=24)


def test_what_no_graph_can_share_has_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dtypes and modes: torch.compile counts graphs by code object, and ends at 8."""
    seen: dict[int, set[tuple[Any, ...]]] = {}

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(block: Any, x: Tensor, *inputs: Any) -> Any:
            modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            seen.setdefault(id(function.__code__), set()).add((len(x) == 1, x.dtype, *modes))
            return function(block, x, *inputs)

        return run

    multiply_in_one_kernel(monkeypatch, frozenset())  # rounds in other places
    monkeypatch.setattr(compiled.torch, "compile", compile)
    model, schedule = many_subnetworks()
    fast, eager = (SubnetEngine(model, schedule, mode="capacity", compile=on) for on in (True, False))
    contexts = torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16), torch.no_grad
    for dtype, context in product((torch.float32, torch.bfloat16), contexts):
        x, y = small_inputs(model.shape)
        with context():
            for t in STEPS:
                assert torch.equal(fast.to(dtype)(x.to(dtype), t, y), eager.to(dtype)(x.to(dtype), t, y))
    assert len(seen) >= 6 * 4 and all(len(circumstances) == 1 for circumstances in seen.values())
