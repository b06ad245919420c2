"""diffusers' ``DiTTransformer2DModel`` as a backbone, with the promises kept for it too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core_builders import (
    TIMESTEPS,
    random_masks,
    randomize,
    relative_error,
    route_tokens,
    route_widths,
    small_inputs,
)
from diffusers import DiTTransformer2DModel

from dydit.adapters.diffusers_dit import DiffusersDiTAdapter
from dydit.compute.analytic import executed_macs
from dydit.compute.counting import count_macs
from dydit.config import DyDiTConfig
from dydit.costs import static_macs
from dydit.dynamic.convert import convert
from dydit.dynamic.dydit import DyDiT
from dydit.dynamic.loading import load_dydit
from dydit.errors import DataError, ShapeError
from dydit.export.schedule import SubnetSchedule
from dydit.runtime.engine import SubnetEngine

T = torch.tensor(TIMESTEPS)


def backbone(**overrides: Any) -> DiTTransformer2DModel:
    """Random weights, so also a different embedder in every block."""
    model = DiTTransformer2DModel(**{
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6,
        "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, **overrides,
    }).eval()  # fmt: skip
    randomize(model)
    return model


def dynamic(shares: tuple[str, str] = ("some", "some"), seed: int = 0, always_on: bool = True) -> DyDiT:
    config = DyDiTConfig(mlp_groups=8, token_router_ratio=4, always_on=always_on)
    model = convert(backbone(), config, copy=False)
    heads, groups = random_masks(seed, 3, model.shape, always_on)
    route_widths(model, TIMESTEPS, heads, groups)
    x, y = small_inputs(model.shape)
    route_tokens(model, x, T, y, shares)
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"activation_fn": "gelu"}, {"attention_bias": False}, {"patch_size": 4, "out_channels": None}],
)
@pytest.mark.parametrize("rank", ["magnitude", "none"])
@torch.no_grad()
def test_converted_equals_diffusers_own(rank: str, settings: dict[str, Any]) -> None:
    theirs = backbone(**settings)
    model = convert(theirs, DyDiTConfig(rank=rank))
    x, y = small_inputs(model.shape)
    expected = theirs(x, timestep=T, class_labels=y).sample
    for output in (model(x, T, y), model(x, T, y, complete=True)):
        assert relative_error(output, expected) < 1e-5
        assert (output - expected).norm() / expected.norm() < 1e-6


@torch.no_grad()
def test_attention_without_biases_is_sliced_too() -> None:
    model = convert(backbone(attention_bias=False), DyDiTConfig(token_routing=False), copy=False)
    heads, groups = random_masks(0, 3, model.shape)
    route_widths(model, TIMESTEPS, heads, groups)
    x, y = small_inputs(model.shape)
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS))
    assert relative_error(engine(x, T, y), model(x, T, y)) < 1e-5


@pytest.mark.parametrize("shares", [("some", "some"), ("none", "all"), ("none", "none"), ("all", "some")])
@pytest.mark.parametrize("always_on", [True, False])
@torch.no_grad()
def test_sliced_equals_masked_and_costs_the_closed_form(shares: tuple[str, str], always_on: bool) -> None:
    model = dynamic(shares, seed=3, always_on=always_on)
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS))
    x, y = small_inputs(model.shape)
    masked, routing = model(x, T, y, return_routing=True)
    assert relative_error(engine(x, T, y), masked) < 1e-5
    report = count_macs(engine, x, T, y)
    assert report.unsupported == {}
    assert report.total == executed_macs(model.shape, model.routing_config, routing).sum()


def test_the_wrapped_model_costs_the_closed_form() -> None:
    config = DyDiTConfig(head_routing=False, mlp_routing=False, token_routing=True, token_router_ratio=4)
    model = convert(backbone(), config)
    x, y = small_inputs(model.shape)
    report = count_macs(model, x, T, y)
    token_routers = 2 * model.shape.tokens * (8 * 32 + 8)
    assert report.unsupported == {}
    assert report.total == 3 * (static_macs(model.shape) + token_routers)


def test_labels_are_not_dropped_in_training() -> None:
    """diffusers' own embedder would drop a tenth of them, differently in every block."""
    model = convert(backbone()).train()
    x, y = small_inputs(model.shape)
    torch.manual_seed(0)
    outputs = [model(x, T, y, complete=True) for _ in range(20)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_round_trip(tmp_path: Path) -> None:
    model = dynamic()
    model.save_pretrained(tmp_path)
    loaded = load_dydit(tmp_path)
    assert type(loaded.backbone) is DiTTransformer2DModel
    x, y = small_inputs(model.shape)
    assert torch.equal(loaded(x, T, y), model(x, T, y))


def test_latents_and_labels_are_checked() -> None:
    model = convert(backbone())
    x, y = small_inputs(model.shape)
    with pytest.raises(ShapeError, match="latent of shape"):
        model(x[..., :4], T, y)
    with pytest.raises(ShapeError, match="one per sample"):
        model(x, T, y[:1])
    with pytest.raises(ShapeError, match="one per sample"):
        model(x, T[:1], y)
    with pytest.raises(DataError, match="label 11"):
        model(x, T, y + 1)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("activation_fn", "geglu"), ("norm_elementwise_affine", True), ("dropout", 0.1)],
)
def test_settings_that_the_twins_do_not_compute_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ShapeError, match=f"{setting} is {value!r}; expected"):
        DiffusersDiTAdapter().shape(backbone(**{setting: value}))
