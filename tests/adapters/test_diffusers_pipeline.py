"""diffusers' own pipeline around our networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_builders import randomize, route_widths, small_dit
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from dydit.adapters.diffusers_pipeline import PipelineTransformer
from dydit.config import DyDiTConfig
from dydit.dynamic.convert import convert
from dydit.export.schedule import SubnetSchedule
from dydit.runtime.engine import SubnetEngine

STEPS = 3


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


def images(transformer: nn.Module) -> np.ndarray:
    torch.manual_seed(0)
    decoder = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    pipeline = DiTPipeline(transformer=transformer, vae=decoder, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipeline([1, 999], generator=generator, num_inference_steps=STEPS, output_type="np").images


def test_dydit_and_engine_run_in_the_pipeline(backbone: DiTTransformer2DModel) -> None:
    model = convert(backbone, DyDiTConfig(token_routing=False))
    expected = images(backbone)
    assert expected.std() > 0.01
    np.testing.assert_allclose(images(PipelineTransformer(model)), expected, atol=1e-4)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    steps = [float(t) for t in scheduler.timesteps]
    rng = np.random.default_rng(0)
    heads, groups = (rng.random((STEPS, 2, 2)) < 0.5 for _ in range(2))
    heads[..., 0] = groups[..., 0] = True
    route_widths(model, steps, heads, groups)
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, steps))
    masked, sliced = images(PipelineTransformer(model)), images(PipelineTransformer(engine))
    assert np.abs(masked - expected).max() > 1e-3
    np.testing.assert_allclose(sliced, masked, atol=1e-4)


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
