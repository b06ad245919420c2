"""The tables are total both ways: every tensor of either side has exactly one counterpart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from checkpoint_builders import small_diffusers
from core_builders import small_dit, small_dydit

from dydit.config import DyDiTConfig
from dydit.dynamic.loading import public_state
from dydit.errors import CheckpointError
from dydit.models.checkpoints import diffusers_layout, public_dydit
from dydit.models.checkpoints.names import COPIES, ROWS, SAME, Relation, Row, expand


def test_diffusers_table_is_total() -> None:
    ours = [name for name in small_dit().state_dict() if name not in diffusers_layout.COMPUTED]
    entries = expand(diffusers_layout.TABLE, ours, depth=2)
    theirs = Counter(name for entry in entries for name in entry.theirs)
    assert [entry.ours for entry in entries] == ours
    assert theirs == Counter(small_diffusers().state_dict().keys())


@pytest.mark.parametrize("always_on", [True, False])
def test_public_dydit_table_is_total(always_on: bool) -> None:
    model = small_dydit(config=DyDiTConfig(always_on=always_on, token_router_ratio=4))
    names = Counter(public_state(model).keys())
    assert max(names.values()) == 1 and len(names) == len(model.state_dict())
    routers = {
        f"blocks.{i}.{router}.{leaf}"
        for i in range(2)
        for router in (
            "attn_rate.router", "mlp_rate.router", "token_selection.mlp_head.0", "token_selection.mlp_head.2"
        )
        for leaf in ("weight", "bias")
    }  # fmt: skip
    assert set(names) == routers | set(model.backbone.state_dict())
    assert len(public_dydit.TABLE) == 4


def test_a_tensor_without_a_row_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"tensor blocks\.0\.norm1\.weight has no counterpart"):
        expand(diffusers_layout.TABLE, ["blocks.0.norm1.weight"], depth=1)


def test_a_name_is_matched_whole() -> None:
    row = Row("a.{i}.b.{rest}", ("c.{i}.{rest}",))
    assert expand([row], ["a.12.b.weight"], 1)[0].theirs == ("c.12.weight",)
    for name in ("a.x.b.weight", "xa.1.b.weight", "aa1.b.weight", "a.1.b."):
        with pytest.raises(CheckpointError):
            expand([row], [name], 1)


@pytest.mark.parametrize(("relation", "parts"), [(SAME, 1), (ROWS, 3), (COPIES, 4)])
def test_joining_undoes_splitting(relation: Relation, parts: int) -> None:
    ours = torch.randn(6, 5)
    theirs: Sequence[torch.Tensor] = relation.split(ours, parts)
    assert {tuple(t.shape) for t in theirs} == {relation.part_shape((6, 5), parts)}
    assert len(theirs) == parts
    assert torch.equal(relation.join((str(i), t) for i, t in enumerate(theirs)), ours)
