"""Counted and analytic MACs agree in every block and every part, not only in their sum."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from core_builders import TIMESTEPS, randomize, small_dit, small_dydit, small_inputs
from diffusers import DiTTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dydit.adapters.registry import ADAPTERS, adapter_for, backbone_type
from dydit.compute.analytic import executed_macs, executed_table, masked_table, static_table
from dydit.compute.counting import count_macs
from dydit.compute.engine import count_engine
from dydit.compute.on_meta import count_on_meta, like
from dydit.compute.table import OTHER, OUTSIDE, MacTable
from dydit.config import DyDiTConfig
from dydit.costs import ATTENTION_PRODUCTS, MLP, NORMS, PARTS, ROUTERS, outer_macs, static_macs
from dydit.dynamic.convert import convert
from dydit.dynamic.dydit import DyDiT
from dydit.export.schedule import SubnetSchedule
from dydit.models.dit import DiT
from dydit.models.presets import PRESETS
from dydit.runtime.engine import SubnetEngine
from dydit.shapes import CONDITIONINGS, ModelShape

TEXT = {"context_dim": 16, "context_length": 3}


def check_static(name: str, conditioning: str, sample_size: Any, **overrides: Any) -> ModelShape:
    text = TEXT if conditioning == "adaln_single" else {}
    build = partial(
        DiT.from_preset, name, sample_size=sample_size, conditioning=conditioning, **text, **overrides
    )
    report = count_on_meta(build)
    with torch.device("meta"):
        shape = build().shape
    analytic = static_table(shape)
    assert analytic.differences(report.table) == [] and report.unsupported == {}
    assert analytic.total == report.total == static_macs(shape) == sum(report.by_part.values())
    assert analytic.by_block == report.by_block
    assert report.by_block[OUTSIDE] == outer_macs(shape)
    return shape


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("sample_size", [32, 64, (32, 64)])
def test_every_design_and_resolution(conditioning: str, sample_size: int | tuple[int, int]) -> None:
    check_static("DiT-S/2", conditioning, sample_size, depth=2)


@pytest.mark.parametrize("sample_size", [64, (24, 40)])
def test_the_largest_model_at_512_px_and_in_a_rectangle(sample_size: int | tuple[int, int]) -> None:
    shape = check_static("DiT-XL/2", "adaln_zero", sample_size)
    if sample_size == 64:
        # Twice the side: four times the tokens, sixteen times attention's products.
        parts, quarter = static_table(shape).by_part, check_static("DiT-XL/2", "adaln_zero", 32, depth=28)
        small = static_table(quarter).by_part
        assert parts[MLP] == 4 * small[MLP] and parts[ATTENTION_PRODUCTS] == 16 * small[ATTENTION_PRODUCTS]


@settings(max_examples=12)
@given(
    st.sampled_from(PRESETS),
    st.sampled_from(CONDITIONINGS),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.booleans(),
    st.sampled_from([1.5, 4.0]),
)
def test_every_preset_and_size(
    name: str, conditioning: str, cells: tuple[int, int], learn_sigma: bool, mlp_ratio: float
) -> None:
    size = (8 * cells[0], 8 * cells[1])
    check_static(name, conditioning, size, depth=1, learn_sigma=learn_sigma, mlp_ratio=mlp_ratio)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize(
    "config",
    [
        DyDiTConfig(mlp_groups=8, token_router_ratio=4),
        DyDiTConfig(head_routing=False, always_on=False),
        DyDiTConfig(token_routing=False),
    ],
)
def test_the_masked_model(conditioning: str, config: DyDiTConfig) -> None:
    model = small_dydit(conditioning=conditioning, config=config, mixed=False)
    analytic = masked_table(model.shape, config)
    assert analytic.differences(count_on_meta(like(model)).table) == []
    x, y = small_inputs(model.shape, batch=1)
    assert analytic.differences(count_macs(model, x, 20.0, y).table) == []
    extra = MacTable.sum([analytic]).by_part
    assert extra.pop(ROUTERS) + static_macs(model.shape) == analytic.total
    assert extra == static_table(model.shape).by_part


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_the_engine(conditioning: str) -> None:
    model = small_dydit(conditioning=conditioning)
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS))
    x, y = small_inputs(model.shape)
    for t in TIMESTEPS:
        call = count_engine(engine, x, t, y)
        assert call.analytic.differences(call.counted.table) == []
        _, routing = model(x, t, y, return_routing=True)
        assert call.kept_tokens.tolist() == routing.tokens.sum(-1).tolist()
        assert call.analytic.total == executed_macs(model.shape, model.routing_config, routing).sum()
    assert not any(m._forward_hooks or getattr(m, "_listeners", None) for m in engine.modules())


@torch.no_grad()
def test_the_engine_without_token_routers() -> None:
    model = small_dydit(config=DyDiTConfig(token_routing=False))
    schedule = SubnetSchedule.from_model(model, TIMESTEPS)
    call = count_engine(SubnetEngine(model, schedule), *_call(model, 20.0))
    assert call.analytic.differences(call.counted.table) == []
    assert (call.kept_tokens == model.shape.tokens).all()
    assert call.analytic.total == schedule.macs_per_timestep()[TIMESTEPS.index(20.0)]
    assert ROUTERS not in call.counted.by_part


def _call(model: DyDiT, t: float) -> tuple[Tensor, float, Tensor]:
    x, y = small_inputs(model.shape, batch=1)
    return x, t, y


@torch.no_grad()
def test_diffusers_own_model() -> None:
    backbone = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2,
        sample_size=8, num_embeds_ada_norm=10,
    )  # fmt: skip
    randomize(backbone)
    model = convert(backbone.eval(), DyDiTConfig(token_router_ratio=4), copy=False)
    assert masked_table(model.shape, model.routing_config).differences(count_on_meta(like(model)).table) == []
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS))
    call = count_engine(engine, *_call(model, 20.0))
    assert call.analytic.differences(call.counted.table) == []


def test_complete_is_the_static_model_in_every_part() -> None:
    """Everything on and no router: what the backbone itself executes."""
    shape, config = small_dit().shape, DyDiTConfig(token_routing=False)
    full = (
        torch.full((1, shape.depth), n).numpy() for n in (shape.num_heads, shape.mlp_groups, shape.tokens)
    )
    assert executed_table(shape, config, *full).differences(static_table(shape)) == []


def test_every_adapter_knows_its_layers() -> None:
    for name in ADAPTERS:
        with torch.device("meta"):
            adapter = adapter_for(backbone_type(name)())
        assert set(adapter.layer_parts.values()) == set(PARTS) - {ATTENTION_PRODUCTS, NORMS, ROUTERS}


def test_a_layer_that_no_part_claims_is_shown_as_other() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return self.layer(x)

    report = count_macs(Foreign(), torch.zeros(2, 3), 0, torch.zeros(2))
    assert report.by_part == {OTHER: 30}
    assert report.table.cells == {OUTSIDE: {OTHER: 30}}


def test_differences_name_the_place() -> None:
    mine, its = (
        MacTable({"block 0": {MLP: 3}}),
        MacTable({"block 0": {MLP: 3, ROUTERS: 1}, OUTSIDE: {MLP: 2}}),
    )
    assert mine.differences(its) == ["block 0, routers: 0 and 1 MACs", "outside blocks, MLP: 0 and 2 MACs"]
    assert mine.differences(mine) == []
    both = MacTable.sum([mine, its])
    assert both.total == 9 and both.by_part == {MLP: 8, ROUTERS: 1}
    assert both.by_block == {"block 0": 7, OUTSIDE: 2}


def test_counting_without_weights_equals_counting_with_them() -> None:
    model = small_dit(conditioning="cross_attention")
    x, y = small_inputs(model.shape, batch=1)
    assert count_on_meta(like(model)).table == count_macs(model, x, 5, y).table


def test_a_model_is_rebuilt_from_all_of_its_arguments() -> None:
    """Also from those given by position, which diffusers' own from_config leaves out."""
    model = DiT(8, 4, 3, hidden_size=32, depth=1, num_heads=4)
    assert like(model)().shape == model.shape
