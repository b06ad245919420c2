"""The second promise: what is reported is what ran, and the closed form agrees to the last MAC."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_builders import TIMESTEPS, gates_of, route_tokens, small_dit, small_dydit, small_inputs
from torch import Tensor, nn

from dydit.compute.analytic import executed_macs, executed_table, masked_table, static_table
from dydit.compute.counting import MacReport, count_macs
from dydit.compute.engine import count_engine
from dydit.compute.table import OTHER, MacTable
from dydit.config import DyDiTConfig
from dydit.costs import ROUTERS, block_cost, outer_macs, static_macs
from dydit.dynamic.dydit import DyDiT
from dydit.export.schedule import SubnetSchedule
from dydit.models.dit import DiT
from dydit.runtime.engine import SubnetEngine
from dydit.shapes import CONDITIONINGS


def check_sums(report: MacReport, blocks: int = 2) -> None:
    assert report.unsupported == {}
    sums = [sum(counts.values()) for counts in (report.by_block, report.by_op, report.by_part)]
    assert sums == [report.total] * 3 and report.total > 0
    assert OTHER not in report.by_part
    assert list(report.by_block) == [*(f"block {i}" for i in range(blocks)), "outside blocks"]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_static_model_costs_the_closed_form(conditioning: str) -> None:
    model = small_dit(conditioning=conditioning, sample_size=(8, 4), learn_sigma=False, mlp_ratio=3.0)
    x, y = small_inputs(model.shape)
    report = count_macs(model, x, 500, y)
    check_sums(report)
    assert report.total == 3 * static_macs(model.shape)
    assert report.table.differences(MacTable.sum([static_table(model.shape)] * 3)) == []
    assert report.by_block["outside blocks"] == 3 * outer_macs(model.shape)
    assert report.by_op["scaled_dot_product_attention"] > 0


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("always_on", [True, False])
def test_the_masked_model_costs_everything_and_all_routers(conditioning: str, always_on: bool) -> None:
    config = DyDiTConfig(mlp_groups=8, token_router_ratio=4, always_on=always_on)
    model = small_dydit(conditioning=conditioning, config=config)
    x, y = small_inputs(model.shape)
    report = count_macs(model, x, torch.tensor(TIMESTEPS), y)
    check_sums(report)
    shape = model.shape
    full = block_cost(shape, model.router_shape).executed(4, 8, shape.tokens)
    assert report.total == 3 * (outer_macs(shape) + 2 * full)
    by_part = MacTable.sum([masked_table(shape, config)] * 3).by_part
    assert report.by_part == by_part and by_part[ROUTERS] > 0


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("shares", [("some", "some"), ("none", "all"), ("none", "none"), ("all", "all")])
def test_the_engine_costs_the_closed_form_of_its_masks(conditioning: str, shares: tuple[str, str]) -> None:
    model = small_dydit(conditioning=conditioning, config=DyDiTConfig(mlp_groups=8, token_router_ratio=4))
    x, y = small_inputs(model.shape)
    t = torch.tensor(TIMESTEPS)
    route_tokens(model, x, t, y, shares)
    check_engine(model, x, t, y)


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        DyDiTConfig(token_routing=False),
        DyDiTConfig(head_routing=False, token_router_ratio=4),
        DyDiTConfig(mlp_routing=False, token_router_ratio=4),
        DyDiTConfig(always_on=False, token_router_ratio=4, mlp_groups=2),
    ],
)
def test_so_it_does_whatever_is_routed(config: DyDiTConfig, learn_sigma: bool) -> None:
    model = small_dydit(config=config, sample_size=(4, 12), learn_sigma=learn_sigma)
    x, y = small_inputs(model.shape)
    check_engine(model, x, torch.tensor(TIMESTEPS), y)


def test_so_it_does_without_any_head_or_group() -> None:
    model = small_dydit(config=DyDiTConfig(always_on=False, token_router_ratio=4), mixed=False)
    for routers in model.routers:
        for router in (routers.head_router, routers.group_router):
            assert router is not None
            nn.init.constant_(router.router.bias, -15.0)
    x, y = small_inputs(model.shape)
    check_engine(model, x, torch.tensor(TIMESTEPS), y)
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS))
    report = count_macs(engine, x, 20.0, y)
    assert "scaled_dot_product_attention" not in report.by_op


@torch.no_grad()
def check_engine(model: DyDiT, x: Tensor, t: Tensor, y: Tensor) -> None:
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS))
    _, routing = model(x, t, y, return_routing=True)
    expected = executed_macs(model.shape, model.routing_config, routing)
    together = count_macs(engine, x, t, y)
    check_sums(together)
    assert together.total == expected.sum()
    counts = (gates.sum(-1).long().numpy() for gates in gates_of(routing))
    table = executed_table(model.shape, model.routing_config, *counts)
    assert together.table.differences(table) == []
    assert together.by_block["outside blocks"] == len(x) * outer_macs(model.shape)
    alone = count_macs(engine, x[1:2], float(t[1]), y[1:2])
    check_sums(alone)
    assert alone.total == expected[1]
    call = count_engine(engine, x[1:2], float(t[1]), y[1:2])
    assert call.counted.table.differences(call.analytic) == []
    assert call.analytic.total == expected[1]
    assert (call.kept_tokens == routing.tokens[1:2].sum(-1).numpy()).all()


def without_initialising(name: str, **overrides: Any) -> DiT:
    """A preset of zeros, allocated only when read: MACs do not depend on the weights."""
    with torch.device("meta"):
        model = DiT.from_preset(name, sample_size=32, num_classes=1000, **overrides)
    return model.to_empty(device="cpu")


def test_dit_s_2_is_6_07_gmacs() -> None:
    model = without_initialising("DiT-S/2")
    report = count_macs(model, torch.zeros(1, 4, 32, 32), 0, torch.zeros(1, dtype=torch.long))
    assert report.gmacs == pytest.approx(6.07, abs=0.01)
    assert report.total == static_macs(model.shape)
    check_sums(report, blocks=12)


@pytest.mark.parametrize(("name", "depth", "gmacs"), [("DiT-B/2", 12, 23.02), ("DiT-XL/2", 28, 118.69)])
def test_larger_presets_counted_on_two_blocks(name: str, depth: int, gmacs: float) -> None:
    """All blocks are alike, so one and two of them tell the whole (XL/2 itself would take half a minute)."""
    one, two = (
        count_macs(
            without_initialising(name, depth=d),
            torch.zeros(1, 4, 32, 32),
            0,
            torch.zeros(1, dtype=torch.long),
        )
        for d in (1, 2)
    )
    assert two.by_block["block 0"] == two.by_block["block 1"] == two.total - one.total
    total = one.total + (depth - 1) * (two.total - one.total)
    assert total / 1e9 == pytest.approx(gmacs, abs=0.01)
    with torch.device("meta"):
        assert total == static_macs(DiT.from_preset(name, sample_size=32, num_classes=1000).shape)


def test_flops_are_twice_the_macs() -> None:
    report = MacReport(1_500_000_000)
    assert (report.gmacs, report.gflops) == (1.5, 3.0)


class Foreign(nn.Module):
    """A module with the models' call, and an operator that holds multiply-adds and has no rule."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x.flatten(2), x.flatten(2))


def test_an_operator_without_a_rule_is_reported() -> None:
    report = count_macs(Foreign(), torch.zeros(1, 3, 2, 2), 0, torch.zeros(1))
    assert list(report.unsupported) == ["aten::cdist"] and report.unsupported["aten::cdist"] == 1
    assert report.by_block == {"outside blocks": report.total}


def test_work_that_no_output_depends_on_is_counted() -> None:
    """All tokens are kept, so the router's scores only decide that nothing is gathered."""
    model = small_dydit(mixed=False, config=DyDiTConfig(head_routing=False, mlp_routing=False))
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS))
    x, y = small_inputs(model.shape)
    routers = 2 * model.shape.tokens * (2 * 32 + 2)
    assert count_macs(engine, x, 20.0, y).total == 3 * (static_macs(model.shape) + routers)


def test_counting_leaves_the_module_as_it_was() -> None:
    model = small_dydit().train()
    x, y = small_inputs(model.shape)
    count_macs(model, x, 20.0, y)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
