"""An engine that knows a sampling run's calls computes what it computes without, each thing once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from core_builders import relative_error, small_diffusers_dit, small_dydit, small_inputs
from torch import Tensor

import dydit
from dydit.adapters.dit import DiTAdapter
from dydit.compute.counting import count_macs
from dydit.config import DyDiTConfig, SamplerConfig
from dydit.costs import MODULATION_ROWS
from dydit.diffusion import make_sampler
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ShapeError
from dydit.export.schedule import SubnetSchedule
from dydit.runtime import ahead
from dydit.runtime.engine import Mode, SubnetEngine
from dydit.shapes import CONDITIONINGS

STEPS = [float(t) for t in range(990, 0, -90)]  # 11 timesteps


def engine_of(model: DyDiT, mode: Mode = "exact", **options: Any) -> SubnetEngine:
    capacities = [[model.shape.tokens // 2] * model.shape.depth] * len(STEPS)
    given = capacities if mode == "capacity" else None
    schedule = SubnetSchedule.from_model(model, STEPS, capacities=given)
    return SubnetEngine(model, schedule, mode=mode, **options)


def diffusers_dydit() -> DyDiT:
    return dydit.convert(small_diffusers_dit(), DyDiTConfig(token_router_ratio=4))


MODELS = {
    **{name: lambda name=name: small_dydit(conditioning=name) for name in MODULATION_ROWS},
    "diffusers": diffusers_dydit,
}


@pytest.fixture
def conditioned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of each call of the project's adapter for conditioning."""
    seen: list[int] = []
    original = DiTAdapter.condition

    def condition(self: DiTAdapter, model: Any, t: Tensor, y: Tensor) -> Any:
        seen.append(len(t))
        return original(self, model, t, y)

    monkeypatch.setattr(DiTAdapter, "condition", condition)
    return seen


@pytest.mark.parametrize("batch", [1, 3, 5, ahead.ROWS + 1])
@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("name", MODELS)
def test_a_run_computes_what_single_calls_do(name: str, mode: Mode, batch: int) -> None:
    engine = engine_of(MODELS[name](), mode)
    x, y = small_inputs(engine.shape, batch=batch)
    run = engine.for_run(STEPS, y)
    for t in STEPS:
        assert relative_error(run(x, t, y), engine(x, t, y)) < 1e-5


def test_half_precision() -> None:
    engine = engine_of(small_dydit(), dtype=torch.bfloat16)
    x, y = small_inputs(engine.shape)
    run = engine.for_run(STEPS, y)
    for t in STEPS:
        assert relative_error(run(x.bfloat16(), t, y), engine(x.bfloat16(), t, y)) < 0.1


def test_each_call_is_conditioned_once(conditioned: list[int]) -> None:
    """Also where a method asks for most timesteps twice, as Heun's does."""
    engine = engine_of(small_dydit())
    x, y = small_inputs(engine.shape, batch=4)
    calls = [STEPS[0], *(t for t in STEPS[1:] for _ in range(2))]
    conditioned.clear()
    run = engine.for_run(calls, y)
    for t in calls:
        run(x, t, y)
    assert sum(conditioned) == 4 * len(calls)
    assert conditioned == [ahead.ROWS, ahead.ROWS, 4 * len(calls) - 2 * ahead.ROWS]


def test_other_calls_are_run_as_any_other(conditioned: list[int]) -> None:
    engine = engine_of(small_dydit())
    x, y = small_inputs(engine.shape)
    run, others = engine.for_run(STEPS, y), [(STEPS[3], y), (STEPS[0], y.flip(0)), (STEPS[0], y.int())]
    expected = [engine(x, t, labels) for t, labels in others]
    x2, y2 = x[:2], y[:2]
    for (t, labels), output in zip(others, expected, strict=True):
        assert torch.equal(run(x, t, labels), output)
    assert torch.equal(run(x2, STEPS[0], y2), engine(x2, STEPS[0], y2))
    per_sample = torch.tensor([STEPS[0], STEPS[1], STEPS[0]])
    assert torch.equal(run(x, per_sample, y), engine(x, per_sample, y))
    for wrong in (x[:1], torch.cat([x, x])):
        with pytest.raises(ShapeError, match=r"labels of shape \(3,\); expected \(\d,\), one per sample"):
            run(wrong, STEPS[0], y)
    conditioned.clear()
    for t in STEPS:  # none of these calls was what the run waits for
        run(x, t, y)
    assert conditioned == [30, 3]
    assert torch.equal(run(x, STEPS[0], y), engine(x, STEPS[0], y))  # one too many


@pytest.mark.parametrize("shape", [(), (3, 1), (3, 4)])
def test_labels_of_another_shape_are_refused_as_in_any_call(shape: tuple[int, ...]) -> None:
    engine = engine_of(small_dydit())
    x, _ = small_inputs(engine.shape)
    wrong = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ShapeError, match="labels of shape") as alone:
        engine(x, STEPS[0], wrong)
    with pytest.raises(ShapeError) as announced:
        engine.for_run(STEPS, wrong)(x, STEPS[0], wrong)
    assert str(announced.value) == str(alone.value)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.bfloat16, torch.float32)])
def test_a_model_that_is_converted_within_a_run(dtypes: Sequence[torch.dtype]) -> None:
    engine = engine_of(small_dydit())
    x, y = small_inputs(engine.shape)
    run = engine.for_run(STEPS, y)
    run(x, STEPS[0], y)
    for dtype in dtypes:
        engine.model.to(dtype)
    x = x.to(dtypes[-1])
    assert torch.equal(run(x, STEPS[1], y), engine(x, STEPS[1], y))


def test_labels_that_are_written_over_are_other_labels() -> None:
    engine = engine_of(small_dydit())
    x, y = small_inputs(engine.shape)
    run = engine.for_run(STEPS, y)
    run(x, STEPS[0], y)
    y.copy_(y.flip(0).clone())
    assert torch.equal(run(x, STEPS[1], y), engine(x, STEPS[1], y))


@pytest.mark.parametrize("conditioning", [name for name in CONDITIONINGS if name not in MODULATION_ROWS])
def test_designs_that_modulate_no_block_by_itself_gain_nothing(conditioning: str) -> None:
    engine = engine_of(small_dydit(conditioning=conditioning))
    assert engine.for_run(STEPS, small_inputs(engine.shape)[1]) is engine


def test_compiled_engines_and_gpus_gain_nothing() -> None:
    model = small_dydit()
    y = small_inputs(model.shape)[1]
    compiled = engine_of(model, compile=True)
    assert compiled.for_run(STEPS, y) is compiled
    engine = engine_of(model)
    assert engine.for_run(STEPS, y.to("meta")) is engine


def test_under_autocast_it_runs_as_it_does_without() -> None:
    engine = engine_of(small_dydit())
    x, y = small_inputs(engine.shape)
    run = engine.for_run(STEPS, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(x, STEPS[0], y), engine(x, STEPS[0], y))


def test_what_is_counted_is_the_call_itself() -> None:
    engine = engine_of(small_dydit())
    x, y = small_inputs(engine.shape)

    class Run(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.engine, self.run = engine, engine.for_run(STEPS, y)

        def forward(self, x: Tensor, t: float, y: Tensor) -> Tensor:
            return self.run(x, t, y)

    assert count_macs(Run(), x, STEPS[0], y).total == count_macs(engine, x, STEPS[0], y).total


def test_another_engine_called_meanwhile_is_not_in_the_run(conditioned: list[int]) -> None:
    engine, other = engine_of(small_dydit()), engine_of(small_dydit(1))
    x, y = small_inputs(engine.shape)
    expected = other(x, STEPS[0], y)
    run, heard = engine.for_run(STEPS, y), []
    with engine.blocks[0].listening(lambda _: heard.append(other(x, STEPS[0], y))):
        run(x, STEPS[0], y)
    assert torch.equal(heard[0], expected)
    conditioned.clear()
    run(x, STEPS[1], y)
    assert conditioned == []


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", ["ddim", "flow_heun"])
def test_samplers_tell_the_engine_what_they_will_call(
    name: str, scale: float, conditioned: list[int]
) -> None:
    model = small_dydit(learn_sigma=False)
    sampler = make_sampler(SamplerConfig(name=name, steps=7, guidance_scale=scale), learn_sigma=False)
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, sampler.timesteps))
    x, y = small_inputs(model.shape)
    conditioned.clear()
    found = sampler.sample(engine, x, y, model.null_label)
    rows = len(sampler.call_timesteps) * (3 if scale == 1 else 6)
    assert sum(conditioned) == rows and len(conditioned) == -(-rows // 30)  # 30 are full timesteps of 3 or 6
    expected = sampler.sample(lambda x, t, y: engine(x, t, y), x, y, model.null_label)
    assert relative_error(found, expected) < 1e-4


def test_two_threads_sample_as_one_after_the_other() -> None:
    model = small_dydit()
    sampler = make_sampler(SamplerConfig(name="ddim", steps=9), learn_sigma=True)
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, sampler.timesteps))
    starts = [small_inputs(model.shape, seed=seed) for seed in (0, 1)]

    def sample(start: tuple[Tensor, Tensor]) -> Tensor:
        return sampler.sample(engine, *start, model.null_label)

    expected = [sample(start) for start in starts]
    with ThreadPoolExecutor(2) as pool:
        for found, alone in zip(pool.map(sample, starts * 4), expected * 4, strict=True):
            assert torch.equal(found, alone)
