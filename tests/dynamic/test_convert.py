from __future__ import annotations

import copy

import pytest
import torch
from core_builders import gates_of, relative_error, small_dit, small_inputs
from torch import nn

from dydit.config import DyDiTConfig
from dydit.dynamic.convert import convert
from dydit.errors import ShapeError
from dydit.shapes import CONDITIONINGS


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("rank", ["magnitude", "none"])
@torch.no_grad()
def test_open_routers_and_complete_equal_the_backbone(conditioning: str, rank: str) -> None:
    backbone = small_dit(conditioning=conditioning)
    x, y = small_inputs(backbone.shape)
    expected = backbone(x, 500.0, y)
    model = convert(backbone, DyDiTConfig(rank=rank))
    tolerance = 1e-6 if rank == "none" else 1e-5  # reordering changes the order of sums
    assert relative_error(model(x, 500.0, y), expected) < tolerance
    assert relative_error(model(x, 500.0, y, complete=True), expected) < tolerance
    # Both of the converted forms do the same work in the same order.
    assert relative_error(model(x, 500.0, y), model(x, 500.0, y, complete=True)) < 1e-6
    reordered = model.backbone(x, 500.0, y)
    assert relative_error(model(x, 500.0, y, complete=True), reordered) < 1e-6


@torch.no_grad()
def test_open_routers_equal_the_backbone_in_training_too() -> None:
    """With a bias of 15, noise shuts a gate once in three million draws."""
    backbone = small_dit()
    x, y = small_inputs(backbone.shape)
    torch.manual_seed(0)
    model = convert(backbone).train()
    prediction, routing = model(x, 500.0, y, return_routing=True)
    assert all(gates.eq(1).all() for gates in gates_of(routing))
    assert relative_error(prediction, backbone(x, 500.0, y)) < 1e-5


def test_a_copy_leaves_the_backbone_untouched() -> None:
    backbone = small_dit()
    before = copy.deepcopy(backbone.state_dict())
    model = convert(backbone)
    assert model.backbone is not backbone
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    changed = [n for n, t in model.backbone.state_dict().items() if not torch.equal(t, before[n])]
    assert {name.split(".", 2)[-1] for name in changed} == {
        f"{layer}.{kind}" for layer in ("attn.qkv", "mlp.fc1") for kind in ("weight", "bias")
    } | {"attn.proj.weight", "mlp.fc2.weight"}


def test_without_a_copy_the_backbone_is_wrapped() -> None:
    backbone = small_dit()
    weights = backbone.blocks[0].mlp.fc1.weight
    model = convert(backbone, copy=False)
    assert model.backbone is backbone and model.backbone.blocks[0].mlp.fc1.weight is weights


def test_rank_none_keeps_the_order() -> None:
    backbone = small_dit()
    model = convert(backbone, DyDiTConfig(rank="none"))
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, model.backbone.state_dict()[name])


def test_mode_dtype_and_groups_follow() -> None:
    assert not convert(small_dit()).training and convert(small_dit().train()).training
    model = convert(small_dit().bfloat16(), DyDiTConfig(mlp_groups=8))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (model.shape.mlp_groups, convert(small_dit()).shape.mlp_groups) == (8, 4)


def test_router_parameters_are_named_so() -> None:
    model = convert(small_dit())
    routers = {id(p) for p in model.router_parameters()}
    backbone = {id(p) for p in model.backbone_parameters()}
    assert routers and backbone and not routers & backbone
    for name, parameter in model.named_parameters():
        assert ("router" in name) == (id(parameter) in routers) == (id(parameter) not in backbone)


def test_what_cannot_be_converted_is_refused() -> None:
    backbone = small_dit()
    with pytest.raises(ShapeError, match="mlp_groups 7 does not divide mlp_hidden 128"):
        convert(backbone, DyDiTConfig(mlp_groups=7))
    with pytest.raises(ShapeError, match=r"model of class Linear; expected one of"):
        convert(nn.Linear(1, 1))
    backbone.blocks[0].mlp.act = nn.Sigmoid()
    with pytest.raises(ShapeError, match=r"the MLP's activation moves zero; expected act\(0\) = 0"):
        convert(backbone)
