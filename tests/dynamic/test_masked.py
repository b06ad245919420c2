"""The masked form against the plain backbone with weights cut to zero: a second way to leave parts out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from core_builders import random_masks, relative_error, routing_of, small_dydit, small_inputs
from torch import Tensor, nn

from dydit.adapters.base import AttentionParts
from dydit.dynamic.dydit import DyDiT
from dydit.dynamic.masked import masked_attention
from dydit.models.dit import DiT
from dydit.routing.routing import Routing
from dydit.shapes import CONDITIONINGS


@torch.no_grad()
def cut(backbone: DiT, heads: np.ndarray, groups: np.ndarray) -> DiT:
    """A copy whose output projections ignore what masks (L, H) and (L, G) switch off."""
    backbone = copy.deepcopy(backbone)
    for block, head_mask, group_mask in zip(backbone.blocks, heads, groups, strict=True):
        for layer, mask in ((block.attn.proj, head_mask), (block.mlp.fc2, group_mask)):
            columns = layer.weight.unflatten(1, (len(mask), -1))
            layer.weight.copy_((columns * torch.from_numpy(mask)[None, :, None]).flatten(1))
    return backbone


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_width_masks_equal_weights_cut_to_zero(conditioning: str) -> None:
    model = small_dydit(conditioning=conditioning)
    heads, groups = random_masks(5, 3, model.shape, always_on=False)
    x, y = small_inputs(model.shape)
    tokens = torch.ones(3, 2, model.shape.tokens)
    masked = model(x, 500.0, y, routing=routing_of(heads, groups, tokens))
    for i in range(3):  # every sample its own masks
        expected = cut(model.backbone, heads[i], groups[i])(x[i : i + 1], 500.0, y[i : i + 1])
        assert relative_error(masked[i : i + 1], expected) < 1e-5


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_no_token_equals_an_mlp_of_zeros(conditioning: str) -> None:
    model = small_dydit(conditioning=conditioning)
    x, y = small_inputs(model.shape)
    complete = Routing.complete(model.shape, 3, x)
    nothing = Routing(complete.heads, complete.groups, torch.zeros_like(complete.tokens))
    expected = copy.deepcopy(model.backbone)
    for block in expected.blocks:
        nn.init.zeros_(block.mlp.fc2.weight)
        nn.init.zeros_(block.mlp.fc2.bias)
    assert relative_error(model(x, 500.0, y, routing=nothing), expected(x, 500.0, y)) < 1e-5


@torch.no_grad()
def test_a_token_that_is_off_passes_the_last_blocks_mlp_by() -> None:
    """In the last block tokens no longer mix: the ones that are on must not notice the others."""
    model = small_dydit()
    x, y = small_inputs(model.shape)
    routing = Routing.complete(model.shape, 3, x)
    tokens = routing.tokens.clone()
    tokens[:, 1, ::2] = 0

    def patches(output: Tensor) -> Tensor:
        return output.unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3)  # (B, C, N, P, P)

    mixed = patches(model(x, 500.0, y, routing=Routing(routing.heads, routing.groups, tokens)))
    on = patches(model(x, 500.0, y, routing=routing))
    tokens[:, 1] = 0
    off = patches(model(x, 500.0, y, routing=Routing(routing.heads, routing.groups, tokens)))
    torch.testing.assert_close(mixed[:, :, ::2], off[:, :, ::2])
    torch.testing.assert_close(mixed[:, :, 1::2], on[:, :, 1::2])
    assert relative_error(on, off) > 1e-3


def test_the_token_router_reads_between_attention_and_norm_2() -> None:
    model: DyDiT = small_dydit(depth=1)
    x, y = small_inputs(model.shape)
    seen: list[Tensor] = []
    router, block = model.routers[0].token_router, model.backbone.blocks[0]
    assert router is not None
    router.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    block.norm2.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    model(x, 500.0, y)
    assert len(seen) == 2 and seen[0] is seen[1]


@pytest.mark.parametrize("heads", [None, torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1]])])
@torch.no_grad()
def test_separate_and_fused_projections_agree(heads: Tensor | None) -> None:
    torch.manual_seed(0)
    fused, out = nn.Linear(32, 96), nn.Linear(32, 32)
    separate = [nn.Linear(32, 32) for _ in range(3)]
    for layer, weight, bias in zip(separate, fused.weight.split(32), fused.bias.split(32), strict=True):
        layer.weight.copy_(weight), layer.bias.copy_(bias)
    x = torch.randn(2, 6, 32)
    one = masked_attention(AttentionParts((fused,), out, 4), x, heads)
    other = masked_attention(AttentionParts(tuple(separate), out, 4), x, heads)
    assert relative_error(other, one) < 1e-5


def test_under_autocast_gates_do_not_widen_what_they_multiply() -> None:
    """A float32 gate would make float32 of all hidden units of the MLP, and keep them for the backward."""
    model = small_dydit(mixed=False).train()
    x, y = small_inputs(model.shape, batch=2)
    dtypes = set()

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1] == model.shape.mlp_hidden and tensor.ndim == 3:
            dtypes.add(tensor.dtype)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        _, routing = model(x, torch.tensor([500.0, 20.0]), y, return_routing=True)
    assert dtypes == {torch.bfloat16}
    assert routing.heads.dtype == routing.tokens.dtype == torch.float32
