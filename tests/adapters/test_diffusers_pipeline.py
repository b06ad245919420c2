"""diffusers' own pipeline around our networks."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from core_builders import randomize, route_widths, small_dit
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, PNDMScheduler
from torch import nn

from dydit.adapters.diffusers_pipeline import PipelineTransformer
from dydit.config import DyDiTConfig
from dydit.dynamic.convert import convert
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ShapeError
from dydit.export.schedule import SubnetSchedule
from dydit.runtime.ahead import Ahead, Conditioned
from dydit.runtime.engine import SubnetEngine

STEPS = 3
CLASSES = [1, 999]


@pytest.fixture()
def backbone() -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
    ).eval()
    randomize(model)
    return model


def pipeline_of(transformer: nn.Module, scheduler: DDIMScheduler | None = None) -> DiTPipeline:
    torch.manual_seed(0)
    decoder = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    pipeline = DiTPipeline(transformer=transformer, vae=decoder, scheduler=scheduler or DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: DiTPipeline, seed: int = 1) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return pipeline(CLASSES, generator=generator, num_inference_steps=STEPS, output_type="np").images


def images(transformer: nn.Module, scheduler: DDIMScheduler | None = None) -> np.ndarray:
    return run(pipeline_of(transformer, scheduler))


@pytest.fixture()
def model(backbone: DiTTransformer2DModel) -> DyDiT:
    return convert(backbone, DyDiTConfig(token_routing=False))


@pytest.fixture()
def engine(model: DyDiT) -> SubnetEngine:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    steps = [float(t) for t in scheduler.timesteps]
    rng = np.random.default_rng(0)
    heads, groups = (rng.random((STEPS, 2, 2)) < 0.5 for _ in range(2))
    heads[..., 0] = groups[..., 0] = True
    route_widths(model, steps, heads, groups)
    return SubnetEngine(model, SubnetSchedule.from_model(model, steps))


@pytest.fixture()
def conditioned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Timesteps that are conditioned together, time after time."""
    seen: list[int] = []
    original = Ahead._next

    def following(self: Ahead) -> list[Conditioned]:
        seen.append(len(made := original(self)))
        return made

    monkeypatch.setattr(Ahead, "_next", following)
    return seen


def test_dydit_runs_in_the_pipeline(backbone: DiTTransformer2DModel, model: DyDiT) -> None:
    expected = images(backbone)
    assert expected.std() > 0.01
    np.testing.assert_allclose(images(PipelineTransformer(model)), expected, atol=1e-4)


def test_engine_runs_in_the_pipeline(
    backbone: DiTTransformer2DModel, engine: SubnetEngine, conditioned: list[int]
) -> None:
    masked, sliced = images(PipelineTransformer(engine.model)), images(PipelineTransformer(engine))
    assert np.abs(masked - images(backbone)).max() > 1e-3
    np.testing.assert_allclose(sliced, masked, atol=1e-4)
    assert conditioned == []
    scheduler = DDIMScheduler()
    pipeline = pipeline_of(PipelineTransformer(engine, scheduler), scheduler)
    np.testing.assert_allclose(run(pipeline), masked, atol=1e-4)
    assert conditioned == [STEPS]
    np.testing.assert_array_equal(run(pipeline), run(pipeline))
    assert conditioned == [STEPS] * 3


def test_a_scheduler_changes_no_other_network(model: DyDiT) -> None:
    scheduler = DDIMScheduler()
    known = images(PipelineTransformer(model, scheduler), scheduler)
    np.testing.assert_array_equal(known, images(PipelineTransformer(model)))


def test_pipelines_in_threads_share_an_engine(engine: SubnetEngine, conditioned: list[int]) -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    shared = PipelineTransformer(engine, scheduler)
    expected = [run(pipeline_of(shared), seed) for seed in range(4)]
    pipelines = [pipeline_of(shared) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, pipelines, range(4)))
    np.testing.assert_array_equal(found, expected)
    assert conditioned == [STEPS] * 8


def test_another_network_and_other_calls_than_the_scheduler_s(engine: SubnetEngine) -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    wrapped = PipelineTransformer(engine, scheduler)
    x, y = torch.randn(2, 4, 4, 4), torch.tensor(CLASSES)
    first, second, last = (t.expand(2) for t in scheduler.timesteps)
    for t in first, last, second, first, torch.stack([first[0], last[0]]), first[0]:
        torch.testing.assert_close(wrapped(x, t, y).sample, engine(x, t, y), atol=1e-5, rtol=1e-5)
    for copied in copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped)):
        torch.testing.assert_close(copied(x, second, y).sample, engine(x, second, y))
    for wrong in first[:1], first[:1].expand(7), first.unsqueeze(1):
        with pytest.raises(ShapeError, match="timesteps of shape"):
            wrapped(x, wrong, y)
    unset = PipelineTransformer(engine, PNDMScheduler())  # has no timesteps yet
    assert torch.equal(unset(x, first, y).sample, engine(x, first, y))
    wrapped(x, first, y)
    wrapped.network = small_dit(sample_size=4, in_channels=4)
    labels = torch.tensor([0, 3])
    assert torch.equal(wrapped(x, second, labels).sample, wrapped.network(x, second, labels))


@pytest.mark.parametrize("calls", [range(STEPS), [0, 0], [0, 1, 0, STEPS - 1]])
def test_a_network_that_is_replaced_is_not_held_on_to(calls: Sequence[int]) -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    wrapped = PipelineTransformer(small_dit(sample_size=4, in_channels=4), scheduler)
    first, x, y = weakref.ref(wrapped.network), torch.randn(2, 4, 4, 4), torch.tensor([0, 3])
    for index in calls:
        wrapped(x, scheduler.timesteps[index].expand(2), y)
    wrapped.network = small_dit(sample_size=4, in_channels=4)
    if calls[-1] != STEPS - 1:  # broken off: until the next call
        assert first() is not None
        wrapped(x, scheduler.timesteps[1].expand(2), y)
    gc.collect()
    assert first() is None


def test_the_interface() -> None:
    network = small_dit(sample_size=8).double()
    wrapped = PipelineTransformer(network)
    assert (
        wrapped.config.sample_size == 8
        and wrapped.config.in_channels == 3
        and wrapped.config.out_channels == 6
    )
    assert wrapped.dtype == torch.float64 and wrapped.device == torch.device("cpu")
    x, t, y = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 2]), torch.tensor([0, 3])
    expected = network(x, t, y)
    assert torch.equal(wrapped(x, timestep=t, class_labels=y).sample, expected)
    assert torch.equal(wrapped(x, t, y, return_dict=False)[0], expected)
