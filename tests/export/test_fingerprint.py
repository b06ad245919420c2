from __future__ import annotations

import torch
from core_builders import small_dydit
from torch import nn

from dydit.export.fingerprint import weights_sha256


def test_every_weight_counts() -> None:
    model = small_dydit()
    seen = {weights_sha256(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[-1] += 0.5
            seen.add(weights_sha256(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_dtype_and_names_count_and_layout_does_not() -> None:
    one = nn.Sequential(nn.Linear(4, 4))
    assert weights_sha256(one) == weights_sha256(nn.Sequential(one[0]))
    assert weights_sha256(one) != weights_sha256(nn.Sequential(nn.Identity(), one[0]))
    before = weights_sha256(one)
    one[0].weight.data = one[0].weight.data.t().contiguous().t()
    assert not one[0].weight.is_contiguous() and weights_sha256(one) == before
    assert weights_sha256(one.double()) != before
    assert len(weights_sha256(one.bfloat16())) == 64


def test_a_shape_is_part_of_it() -> None:
    one, other = nn.Module(), nn.Module()
    one.register_buffer("x", torch.zeros(2, 3))
    other.register_buffer("x", torch.zeros(3, 2))
    assert weights_sha256(one) != weights_sha256(other)
    one.register_buffer("empty", torch.zeros(0, 4))
    one.register_buffer("scalar", torch.tensor(1))
    assert weights_sha256(one) == weights_sha256(one)
