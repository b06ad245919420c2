from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from core_builders import TIMESTEPS, relative_error, small_dydit, small_inputs
from torch import Tensor

from dydit.compute.engine import record_token_logits
from dydit.config import DyDiTConfig
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ConfigError, DataError, ScheduleError, ShapeError
from dydit.export.schedule import SubnetSchedule
from dydit.routing.routing import Routing
from dydit.runtime.engine import Mode, SubnetEngine
from dydit.runtime.packing import block_bytes


def engine_of(model: DyDiT, **options: object) -> SubnetEngine:
    return SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS), **options)  # type: ignore[arg-type]


def decided_tokens(engine: SubnetEngine, x: Tensor, t: float, y: Tensor) -> tuple[Tensor, Tensor]:
    """The engine's output, and the token gates (B, L, N) that it decided on."""
    with record_token_logits(engine) as logits:
        output = engine(x, t, y)
    return output, torch.stack([logits[i] > 0 for i in sorted(logits)], dim=1).float()


@pytest.mark.parametrize("t", [500.0, 500, torch.tensor(500.0), torch.tensor(500), torch.tensor([500, 500])])
def test_one_timestep_for_the_batch_in_every_form(t: Tensor | float) -> None:
    model = small_dydit()
    x, y = small_inputs(model.shape, batch=2)
    expected = model(x, torch.tensor([500.0, 500.0]), y)
    assert relative_error(engine_of(model)(x, t, y), expected) < 1e-5


def test_a_mixed_batch_equals_its_samples_alone() -> None:
    model = small_dydit()
    engine = engine_of(model)
    x, y = small_inputs(model.shape, batch=5)
    t = torch.tensor([20.0, 999.0, 20.0, 500.0, 999.0])
    together = engine(x, t, y)
    alone = torch.cat([engine(x[i : i + 1], t[i].item(), y[i : i + 1]) for i in range(5)])
    assert relative_error(together, alone) < 1e-5


def test_dtype_converts_a_copy_and_keeps_the_schedules_masks() -> None:
    model = small_dydit()
    x, y = small_inputs(model.shape)
    engine = engine_of(model, dtype=torch.bfloat16)
    output, tokens = decided_tokens(engine, x.bfloat16(), 500.0, y)
    assert output.dtype == torch.bfloat16 and next(model.parameters()).dtype == torch.float32
    with torch.no_grad():
        heads, groups = model.width_gates(model.backbone.t_embedder(torch.full((len(x),), 500.0)))
        expected = model(x, 500.0, y, routing=Routing(heads, groups, tokens))
    assert relative_error(output.float(), expected) < 0.05
    with pytest.raises(ShapeError, match=r"latent of torch.float32; expected torch.bfloat16"):
        engine(x, 500.0, y)


def test_runs_under_autocast() -> None:
    model = small_dydit()
    x, y = small_inputs(model.shape)
    with torch.autocast("cpu", torch.bfloat16):
        output, tokens = decided_tokens(engine_of(model), x, 500.0, y)
    assert 0 < tokens.sum() < tokens.numel()
    with torch.no_grad():
        heads, groups = model.width_gates(model.backbone.t_embedder(torch.full((len(x),), 500.0)))
        expected = model(x, 500.0, y, routing=Routing(heads, groups, tokens))
    assert relative_error(output.float(), expected) < 0.05


def test_converting_an_engine_forgets_its_packed_weights() -> None:
    model = small_dydit()
    engine = engine_of(model)
    x, y = small_inputs(model.shape)
    expected = engine(x, 500.0, y)
    engine.double()
    assert relative_error(engine(x.double(), 500.0, y), expected) < 1e-5


def test_refuses_a_schedule_of_other_weights() -> None:
    model = small_dydit()
    schedule = SubnetSchedule.from_model(model, TIMESTEPS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.backbone.blocks[1].mlp.fc2.weight[0, 0] += 1e-3
    with pytest.raises(ScheduleError, match=r"weights with sha256 \w{12}…; expected \w{12}….*export again"):
        SubnetEngine(other, schedule)
    x, y = small_inputs(model.shape)
    output = SubnetEngine(other, schedule, verify=False)(x, 500.0, y)
    assert relative_error(output, other(x, 500.0, y)) < 1e-5


def test_refuses_what_it_cannot_run() -> None:
    model = small_dydit()
    engine = engine_of(model)
    x, y = small_inputs(model.shape)
    with pytest.raises(
        ScheduleError, match=r"timestep 21; expected one of the schedule's 3 \(999, 500, 20\)"
    ):
        engine(x, 21.0, y)
    with pytest.raises(ScheduleError, match="timestep 7"):
        engine(x, torch.tensor([20.0, 7.0, 20.0]), y)
    with pytest.raises(ShapeError, match=r"latent of shape \(3, 3, 8, 4\); expected \(batch, 3, 8, 8\)"):
        engine(x[..., :4], 20.0, y)
    with pytest.raises(DataError, match="label 11; expected 0 to 9, or 10 for the null class"):
        engine(x, 20.0, y + 1)
    for dtype in (torch.float32, torch.bool, torch.uint8, torch.int16):
        with pytest.raises(ShapeError, match=rf"labels of {dtype}; expected int64 or int32; use \.long"):
            engine(x, 20.0, y.to(dtype))
    for t in (20.0, torch.zeros(0)):
        with pytest.raises(ShapeError, match="a batch without samples; expected one at least"):
            engine(x[:0], t, y[:0])
    with pytest.raises(ConfigError, match=r"an engine in torch\.int8; expected torch\.float32"):
        engine_of(model, dtype=torch.int8)


def test_refuses_what_lies_on_another_device() -> None:
    model = small_dydit()
    engine = engine_of(model)
    x, y = small_inputs(model.shape)
    for inputs in ((x.to("meta"), y), (x, y.to("meta"))):
        told = (
            rf"latents on {inputs[0].device}, labels on {inputs[1].device}; expected both on cpu; move them"
        )
        with pytest.raises(ShapeError, match=told):
            engine(inputs[0], 20.0, inputs[1])


def test_refuses_text_in_another_dtype() -> None:
    model = small_dydit(conditioning="adaln_single")
    x, y = small_inputs(model.shape)
    engine = engine_of(model, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match=r"text of torch\.float32; expected torch\.bfloat16"):
        engine(x.bfloat16(), 20.0, y)


def test_takes_no_other_weights() -> None:
    model = small_dydit()
    engine = engine_of(model)
    for module in (engine, torch.nn.Sequential(engine)):  # alone, and within another module
        with pytest.raises(ScheduleError, match="weights for an engine that has some; .*make a new engine"):
            module.load_state_dict(module.state_dict())


def test_a_budget_may_be_a_float() -> None:
    model = small_dydit()
    x, y = small_inputs(model.shape)
    blocks = model.adapter.blocks(model.backbone)
    block = max(block_bytes(model.adapter.attention(b), model.adapter.mlp(b)) for b in blocks)
    engine = engine_of(model, memory_budget=float(block))
    assert relative_error(engine(x, 500.0, y), model(x, 500.0, y)) < 1e-5


def test_another_default_device_changes_nothing() -> None:
    model = small_dydit()
    x, y = small_inputs(model.shape)
    expected = engine_of(model)(x, 500.0, y)
    with torch.device("meta"):
        assert torch.equal(engine_of(model)(x, 500.0, y), expected)


@pytest.mark.parametrize("t", [torch.tensor([20.0]), torch.tensor([20.0, 500.0]), torch.zeros(3, 1)])
def test_refuses_timesteps_that_are_not_one_per_sample(t: Tensor) -> None:
    model = small_dydit()
    x, y = small_inputs(model.shape)
    with pytest.raises(ShapeError, match=r"timesteps of shape .*; expected \(3,\), one per sample"):
        engine_of(model)(x, t, y)


@pytest.mark.parametrize("count", [1, 4])
def test_refuses_labels_that_are_not_one_per_sample(count: int) -> None:
    model = small_dydit()
    x, _ = small_inputs(model.shape)
    engine = engine_of(model)
    for t in (20.0, torch.tensor([20.0, 500.0, 20.0])):
        with pytest.raises(ShapeError, match="one per sample"):
            engine(x, t, torch.zeros(count, dtype=torch.long))


def test_never_changes_the_model() -> None:
    model = small_dydit()
    before = copy.deepcopy(model.state_dict())
    engine = engine_of(model)
    x, y = small_inputs(model.shape)
    engine(x, torch.tensor(TIMESTEPS), y)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not engine(x, 20.0, y).requires_grad


def test_everything_on_copies_no_weight() -> None:
    model = small_dydit(mixed=False)
    engine = engine_of(model)
    x, y = small_inputs(model.shape)
    engine(x, torch.tensor(TIMESTEPS), y)
    statistics = engine.pack_statistics()
    assert (statistics.bytes, statistics.evictions) == (0, 0)
    # One subnetwork for all timesteps: packed once per block, then found twice.
    assert (statistics.misses, statistics.hits) == (2, 4)


def test_a_tight_budget_changes_nothing_but_the_packings() -> None:
    model = small_dydit()
    adapter = model.adapter
    blocks = adapter.blocks(model.backbone)
    budget = max(block_bytes(adapter.attention(b), adapter.mlp(b)) for b in blocks)
    tight, roomy = engine_of(model, memory_budget=budget), engine_of(model, memory_budget=100 * budget)
    x, y = small_inputs(model.shape)
    for t in TIMESTEPS * 2:
        assert torch.equal(tight(x, t, y), roomy(x, t, y))
    assert tight.pack_statistics().bytes <= budget
    assert tight.pack_statistics().evictions > 0 == roomy.pack_statistics().evictions
    with pytest.raises(
        ConfigError, match=rf"memory budget of {budget - 1} bytes; expected at least one block's"
    ):
        engine_of(model, memory_budget=budget - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_threads_share_an_engine(mode: Mode, dtype: torch.dtype) -> None:
    model = small_dydit(config=DyDiTConfig(token_router_ratio=4, mlp_groups=8))
    capacities = torch.arange(1, 7).view(len(TIMESTEPS), -1).numpy()
    schedule = SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities)
    blocks = [(model.adapter.attention(b), model.adapter.mlp(b)) for b in model.backbone.blocks]
    budget = max(block_bytes(*weights) for weights in blocks)
    engine = SubnetEngine(model, schedule, dtype, memory_budget=budget, mode=mode)

    def sample(seed: int) -> Tensor:
        x, y = small_inputs(model.shape, seed=seed)
        x = x.to(dtype)
        for t in TIMESTEPS * 5:
            x = x - 0.1 * engine(x, t, y)[:, :3]
        return x

    one_after_another = [sample(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(sample, range(2)))
    for expected, found in zip(one_after_another, together, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_does_not_depend_on_what_ran_before(dtype: torch.dtype) -> None:
    """With memory for one block, whose slots other masks and other blocks had before."""
    model = small_dydit(config=DyDiTConfig(token_router_ratio=4, mlp_groups=8))
    schedule = SubnetSchedule.from_model(model, TIMESTEPS)
    blocks = [(model.adapter.attention(b), model.adapter.mlp(b)) for b in model.backbone.blocks]
    budget = max(block_bytes(*weights) for weights in blocks)
    x, y = small_inputs(model.shape)
    x = x.to(dtype)

    def outputs(engine: SubnetEngine, timesteps: list[float]) -> dict[float, Tensor]:
        return {t: engine(x, t, y).clone() for t in timesteps}

    engine = SubnetEngine(model, schedule, dtype, memory_budget=budget)
    expected = outputs(engine, TIMESTEPS)
    for found in (
        outputs(engine, TIMESTEPS[::-1]),
        outputs(SubnetEngine(model, schedule, dtype), TIMESTEPS[::-1]),
    ):
        assert all(torch.equal(found[t], expected[t]) for t in TIMESTEPS)


def test_null_label_and_scopes() -> None:
    engine = engine_of(small_dydit())
    assert engine.null_label == 10
    modules = dict(engine.named_modules())
    assert all(scope in modules for scope in engine.mac_scopes().values())
    # The blocks own nothing: the engine's parameters are the model's, each once.
    assert not list(engine.blocks.parameters())


def test_an_engine_notices_that_its_model_was_converted_elsewhere() -> None:
    model = small_dydit()
    first, second = engine_of(model), engine_of(model)
    x, y = small_inputs(model.shape)
    before = second(x, 500.0, y)
    first.to(torch.float64)  # and with it the model, also of the second
    assert relative_error(second(x.double(), 500.0, y).float(), before) < 1e-5
    model.to(torch.bfloat16).to(torch.float32)  # loses digits
    now = second(x, 500.0, y)
    assert relative_error(now, engine_of(model)(x, 500.0, y)) < 1e-5
    assert 1e-4 < relative_error(now, before) < 0.1


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("used", [False, True])
def test_an_engine_can_be_copied_and_pickled(mode: Mode, used: bool) -> None:
    model = small_dydit()
    capacities = np.full((len(TIMESTEPS), model.shape.depth), 5)
    schedule = SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities)
    adapter, blocks = model.adapter, model.adapter.blocks(model.backbone)
    budget = 2 * max(block_bytes(adapter.attention(b), adapter.mlp(b)) for b in blocks)
    engine = SubnetEngine(model, schedule, mode=mode, memory_budget=budget)
    x, y = small_inputs(model.shape)
    expected = engine(x, 500.0, y) if used else SubnetEngine(model, schedule, mode=mode)(x, 500.0, y)
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert other.model is not model and other.pack_statistics().bytes == 0
        assert torch.equal(other(x, 500.0, y), expected)
        for t in TIMESTEPS:
            other(x, t, y)
        assert other.pack_statistics().bytes <= budget
