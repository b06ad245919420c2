from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dydit.errors import ShapeError
from dydit.shapes import CONDITIONINGS, ModelShape

XL2 = ModelShape(
    sample_size=(32, 32), patch_size=2, in_channels=4, out_channels=8, hidden_size=1152, depth=28,
    num_heads=16, mlp_hidden=4608, mlp_groups=16, num_classes=1000,
)  # fmt: skip


def changed(**fields: Any) -> ModelShape:
    return dataclasses.replace(XL2, **fields)


def test_derived_numbers() -> None:
    assert (XL2.grid, XL2.tokens, XL2.head_dim, XL2.group_size) == ((16, 16), 256, 72, 288)
    assert XL2.learn_sigma and not changed(out_channels=4).learn_sigma
    rectangle = changed(sample_size=(16, 64), patch_size=4)
    assert (rectangle.grid, rectangle.tokens) == ((4, 16), 64)


def test_in_context_appends_two_tokens() -> None:
    extra = {c: changed(conditioning=c, context_dim=8, context_length=3).extra_tokens for c in CONDITIONINGS}
    assert extra == {**dict.fromkeys(CONDITIONINGS, 0), "in_context": 2}
    assert changed(conditioning="in_context").tokens == 258


def test_with_groups() -> None:
    assert XL2.with_groups(9).group_size == 512
    with pytest.raises(ShapeError, match="mlp_groups 7 does not divide mlp_hidden 4608"):
        XL2.with_groups(7)


def test_is_frozen_and_comparable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        XL2.depth = 3  # type: ignore[misc]
    assert changed() == XL2 and hash(changed()) == hash(XL2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 3}, "patch_size 3 does not divide sample_size 32"),
        ({"patch_size": 0}, "patch_size is 0; expected at least 1"),
        ({"sample_size": (32, 0)}, "sample_size is 0"),
        ({"sample_size": (32,)}, r"sample_size \(32,\); expected one side, or \(height, width\)"),
        ({"num_heads": 7}, "num_heads 7 does not divide hidden_size 1152"),
        ({"num_heads": -1}, "num_heads is -1"),
        ({"hidden_size": 6, "num_heads": 3}, "position embedding's 4 does not divide hidden_size 6"),
        ({"mlp_groups": 0}, "mlp_groups is 0"),
        ({"depth": 0}, "depth is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"conditioning": "none"}, "conditioning 'none'; expected one of in_context"),
        ({"conditioning": "adaln_single"}, "context_dim is 0; expected at least 1"),
        ({"conditioning": "adaln_single", "context_dim": 8}, "context_length is 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        changed(**fields)
