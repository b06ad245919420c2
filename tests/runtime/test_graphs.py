"""CUDA graphs without a GPU: what is captured are the operations, which the stand-in runs again in order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from core_builders import (
    multiply_in_one_kernel,
    random_masks,
    route_tokens,
    route_widths,
    small_dydit,
    small_inputs,
)
from cuda_stand_ins import Event, stand_in_for_streams
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dydit.export.schedule import SubnetSchedule
from dydit.runtime import compiled
from dydit.runtime.engine import SubnetEngine
from dydit.runtime.graphs import CudaGraphs
from dydit.shapes import CONDITIONINGS

STEPS = [float(t) for t in range(950, 0, -200)]
SYNCS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class CaptureError(RuntimeError):
    """What CUDA says of an operation that a capture cannot hold."""


class Recorded(TorchDispatchMode):
    """``torch.cuda.CUDAGraph``: operations on the memory that they were captured with."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SYNCS:
            raise CaptureError(f"{func} when stream is capturing\nCompile with `TORCH_USE_CUDA_DSA`")
        output = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        """Run them again; what they make goes where it went when they were captured."""
        for func, args, kwargs, output in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


# Nothing here but what says so may fail to be recorded.
pytestmark = pytest.mark.filterwarnings("error:not recorded")


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_streams(monkeypatch)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, *_args, **_options: graph)  # entered, it captures
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())


def counted() -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """A function, and what it was called with."""
    calls: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        calls.append(x)
        y = (2 * x)[1:].view(-1)
        y += 1
        return y.exp()

    return function, calls


def test_the_second_call_is_recorded_and_runs_from_then_on() -> None:
    graphs, (function, calls) = CudaGraphs(), counted()
    inputs = [torch.randn(3, 2) for _ in range(4)]
    outputs = [graphs("a", function, x) for x in inputs]
    assert len(calls) == 3  # as it is, to warm up, to be captured
    for x, output in zip(inputs, outputs, strict=True):  # no call writes over what an earlier one gave
        assert torch.equal(output, function(x))


def test_other_keys_shapes_and_dtypes_are_recorded_apart() -> None:
    graphs, (function, calls) = CudaGraphs(), counted()
    for key, x in (("a", torch.ones(3, 2)), ("b", torch.ones(3, 2)), ("a", torch.ones(4, 2)),
                   ("a", torch.ones(3, 2).double())):  # fmt: skip
        before = len(calls)
        for _ in range(3):
            output = graphs(key, function, x)
        assert len(calls) == before + 3
        assert output.dtype == x.dtype and output.shape == (2 * (len(x) - 1),)


def test_forgotten_recordings_are_made_anew() -> None:
    graphs, (function, calls) = CudaGraphs(), counted()
    x = torch.ones(3, 2)
    for _ in range(2):
        for _ in range(3):
            graphs("a", function, x)
        graphs.clear()
    assert len(calls) == 6


def test_a_recording_is_made_outside_of_inference_mode() -> None:
    graphs, (function, _) = CudaGraphs(), counted()
    with torch.inference_mode():
        for _ in range(3):
            graphs("a", function, torch.ones(3, 2))
    x = torch.randn(3, 2)
    assert torch.equal(graphs("a", function, x), function(x))


def test_all_calls_are_in_the_modes_of_the_capture() -> None:
    """What the first call compiles would be compiled again for others."""
    modes = list[tuple[bool, bool]]()

    def function(x: Tensor) -> Tensor:
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return 2 * x

    graphs = CudaGraphs()
    with torch.inference_mode():
        for _ in range(2):
            graphs("a", function, torch.ones(3))
    assert modes == [(False, False)] * 3


def test_under_autocast_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps converted weights until it ends, and a recording would go on reading them."""
    graphs, (function, calls) = CudaGraphs(), counted()
    graphs("a", function, torch.ones(3, 2))
    with monkeypatch.context() as autocast:
        autocast.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        for _ in range(3):
            graphs("a", function, torch.ones(3, 2))
    assert len(calls) == 4 and not graphs._recordings


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once() -> None:
    graphs, calls = CudaGraphs(), list[Tensor]()

    def function(x: Tensor) -> Tensor:
        calls.append(x)
        return x * x.sum().item()

    x = torch.rand(3)
    graphs("a", function, x)
    with pytest.warns(RuntimeWarning, match="not recorded as a CUDA graph: .* when stream is capturing$"):
        assert torch.equal(graphs("a", function, x), function(x))
    before = len(calls)
    assert torch.equal(graphs("a", function, x), function(x)) and len(calls) == before + 2


def test_what_fails_as_it_is_fails_when_it_cannot_be_recorded_too() -> None:
    graphs, failing = CudaGraphs(), list[bool]()

    def function(x: Tensor) -> Tensor:
        if failing:
            raise torch.OutOfMemoryError("no memory")
        return x

    graphs("a", function, torch.ones(3))
    failing.append(True)
    with pytest.warns(RuntimeWarning, match="no memory"), pytest.raises(torch.OutOfMemoryError):
        graphs("a", function, torch.ones(3))


def test_a_graph_that_failed_lives_as_long_as_the_recordings() -> None:
    """When one dies, torch frees what the libraries hold for its stream, which the others read."""
    graphs, (function, _) = CudaGraphs(), counted()
    x = torch.rand(3)
    for _ in range(2):
        graphs("fine", function, torch.ones(3, 2))
    graphs("fails", lambda x: x * x.sum().item(), x)
    assert not graphs._failed
    with pytest.warns(RuntimeWarning, match="not recorded"):
        graphs("fails", lambda x: x * x.sum().item(), x)
    assert len(graphs._failed) == 1
    graphs.clear()
    assert not graphs._failed and not graphs._recordings


def test_nothing_is_forgotten_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = list[bool]()
    graphs, (function, _) = CudaGraphs(), counted()
    monkeypatch.setattr(Event, "synchronize", lambda self: waited.append(bool(graphs._recordings)))
    graphs.clear()
    assert waited == []
    for _ in range(2):
        graphs("a", function, torch.ones(3, 2))
    graphs.clear()
    assert waited == [True]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_replayed_subnetworks_give_what_the_engine_does(
    monkeypatch: pytest.MonkeyPatch, conditioning: str
) -> None:
    """In capacity mode nothing but the values of x, t and y differs from call to call."""
    model = small_dydit(0, mixed=False, conditioning=conditioning)
    heads, groups = random_masks(0, len(STEPS), model.shape)
    route_widths(model, STEPS, heads, groups)
    x, y = small_inputs(model.shape)
    route_tokens(model, x, STEPS[0], y)
    capacities = np.random.default_rng(0).integers(0, model.shape.tokens + 1, (len(STEPS), model.shape.depth))
    schedule = SubnetSchedule.from_model(model, STEPS, capacities=capacities)
    plain = SubnetEngine(model, schedule, mode="capacity", memory_budget=1e9)
    multiply_in_one_kernel(monkeypatch, frozenset())  # rounds in other places
    monkeypatch.setattr(compiled.torch, "compile", lambda function: function)
    engine = SubnetEngine(model, schedule, mode="capacity", memory_budget=1e9, compile=True)
    monkeypatch.setattr(SubnetEngine, "records", property(lambda self: self is engine))
    for seed in range(3):
        x, y = small_inputs(model.shape, seed=seed)
        for t in STEPS:
            assert torch.equal(engine(x, int(t) if seed == 1 else t, y), plain(x, t, y))
    recordings = engine._graphs._recordings.values()
    assert len(recordings) == len(STEPS) and all(recording is not None for recording in recordings)
    rows = torch.tensor([0, 1, 1])[: len(x)]
    engine(x, torch.tensor(STEPS)[rows], y)  # parts of a batch, of any size, are not recorded
    assert len(engine._graphs._called) == len(STEPS)
