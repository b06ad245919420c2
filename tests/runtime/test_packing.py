"""Views of a block's weights."""

from __future__ import annotations

import numpy as np
import torch
from core_builders import small_dit
from torch import Tensor, nn

from dydit.adapters.base import AttentionParts, MlpParts
from dydit.adapters.dit import DiTAdapter
from dydit.export.schedule import is_one_run
from dydit.runtime.packing import tensors_of, view_attention, view_mlp

H, G, D = 4, 8, 32


def parts() -> tuple[AttentionParts, MlpParts]:
    block = small_dit().blocks[0]
    return DiTAdapter().attention(block), DiTAdapter().mlp(block)


def mask(length: int, *on: int) -> np.ndarray:
    return np.isin(np.arange(length), on)


def shares_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def test_components_side_by_side_are_a_view() -> None:
    assert is_one_run(np.stack([mask(H, *on) for on in ((), (0,), (2,), (1, 2), (0, 1, 2, 3))])).all()
    assert not is_one_run(np.stack([mask(H, *on) for on in ((0, 2), (0, 1, 3))])).any()


def test_everything_on_is_the_weights_themselves() -> None:
    attention, mlp = parts()
    heads, groups = view_attention(attention, np.ones(H, bool)), view_mlp(mlp, np.ones(G, bool))
    assert heads.copied_bytes == groups.copied_bytes == 0 and heads.head_dim == D // H
    assert len(heads.qkv) == 1 and not heads.by_head
    layers = [attention.qkv[0], attention.out, mlp.fc1, mlp.fc2]
    originals = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    for tensor, original in zip([*tensors_of(heads), *tensors_of(groups)], originals, strict=True):
        assert tensor.data_ptr() == original.data_ptr() and tensor.shape == original.shape
        assert not tensor.requires_grad


def test_one_run_of_heads_and_of_groups_is_a_view() -> None:
    attention, mlp = parts()
    heads, groups = view_attention(attention, mask(H, 1, 2)), view_mlp(mlp, mask(G, 2, 3, 4))
    assert heads.copied_bytes == groups.copied_bytes == 0
    # The heads' rows lie in three places (q, k, v): three views.
    d, units = D // H, 4 * D // G
    qkv, out, fc1, fc2 = attention.qkv[0], attention.out, mlp.fc1, mlp.fc2
    assert len(heads.qkv) == 3 and not heads.by_head
    for (weight, bias), start in zip(heads.qkv, (0, D, 2 * D), strict=True):
        assert torch.equal(weight, qkv.weight[start + d : start + 3 * d])
        assert bias is not None and torch.equal(bias, qkv.bias[start + d : start + 3 * d])
        assert shares_storage(weight, qkv.weight) and shares_storage(bias, qkv.bias)
    assert torch.equal(heads.out[0], out.weight[:, d : 3 * d]) and shares_storage(heads.out[0], out.weight)
    assert groups.fc1 is not None and groups.fc1[1] is not None
    assert torch.equal(groups.fc1[0], fc1.weight[2 * units : 5 * units])
    assert torch.equal(groups.fc1[1], fc1.bias[2 * units : 5 * units])
    assert torch.equal(groups.fc2[0], fc2.weight[:, 2 * units : 5 * units])
    pairs = zip(
        (groups.fc1[0], groups.fc1[1], groups.fc2[0]), (fc1.weight, fc1.bias, fc2.weight), strict=True
    )
    assert all(shares_storage(tensor, original) for tensor, original in pairs)


def test_separate_layers_stay_three() -> None:
    out, layers = nn.Linear(D, D), tuple(nn.Linear(D, D, bias=False) for _ in range(3))
    packed = view_attention(AttentionParts(layers, out, H), mask(H, 3))
    for (weight, bias), layer in zip(packed.qkv, layers, strict=True):
        assert torch.equal(weight, layer.weight[3 * D // H :]) and bias is None


def test_nothing_on_leaves_the_biases_of_the_output_layers() -> None:
    attention, mlp = parts()
    heads, groups = view_attention(attention, mask(H)), view_mlp(mlp, mask(G))
    assert heads.qkv == () and groups.fc1 is None
    assert heads.out[1] is not None and torch.equal(heads.out[1], attention.out.bias)
    assert groups.fc2[1] is not None and torch.equal(groups.fc2[1], mlp.fc2.bias)
