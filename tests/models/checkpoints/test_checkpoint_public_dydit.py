"""Public DyDiT files of both releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import TINY, save_pt, small_diffusers
from core_builders import TIMESTEPS, small_dit, small_dydit, small_inputs

from dydit.config import DyDiTConfig
from dydit.dynamic.convert import convert
from dydit.dynamic.loading import load_dydit, public_state
from dydit.errors import CheckpointError

T = torch.tensor(TIMESTEPS)


@pytest.mark.parametrize("container", [None, "ema", "model"])
@pytest.mark.parametrize("always_on", [True, False])
@torch.no_grad()
def test_both_releases(tmp_path: Path, always_on: bool, container: str | None) -> None:
    model = small_dydit(config=DyDiTConfig(always_on=always_on, token_router_ratio=4))
    state = public_state(model)
    scores = 4 - int(always_on)
    assert state["blocks.1.attn_rate.router.weight"].shape == (scores, 32)
    assert state["blocks.1.mlp_rate.router.bias"].shape == (scores,)
    path = save_pt(tmp_path / "a.pt", state if container is None else {container: state})
    loaded = load_dydit(path, num_heads=4)
    assert loaded.routing_config == model.routing_config.model_copy(update={"rank": "none"})
    assert loaded.shape == model.shape and not loaded.training
    x, y = small_inputs(model.shape)
    output, routing = loaded(x, T, y, return_routing=True)
    expected, decided = model(x, T, y, return_routing=True)
    assert torch.equal(output, expected)
    for name in ("heads", "groups", "tokens"):
        assert torch.equal(getattr(routing, name), getattr(decided, name))
        assert 0 < getattr(routing, name).mean() < 1


@pytest.mark.parametrize(
    "config",
    [
        {"mlp_groups": 8},
        {"mlp_groups": 16, "always_on": False},
        {"token_routing": False},
        {"head_routing": False},
        {"mlp_routing": False, "always_on": False},
        {"head_routing": False, "mlp_routing": False, "always_on": False},
        {"token_router_ratio": 7},
    ],
)
def test_other_routers(tmp_path: Path, config: dict[str, Any]) -> None:
    wanted = DyDiTConfig(**{"token_router_ratio": 4, "rank": "none", **config})
    model = small_dydit(config=wanted, mixed=False)
    path = save_pt(tmp_path / "a.pt", public_state(model))
    loaded = load_dydit(path, num_heads=4)
    assert loaded.router_shape == model.router_shape and loaded.shape == model.shape
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_heads_are_told_by_the_routers_where_they_can(tmp_path: Path) -> None:
    """48 channels: 3 scores are 3 or 4 heads, 7 scores only 8."""
    ambiguous = small_dydit(mixed=False, hidden_size=48, num_heads=4)
    with pytest.raises(CheckpointError, match="pass num_heads"):
        load_dydit(save_pt(tmp_path / "a.pt", public_state(ambiguous)))
    clear = small_dydit(mixed=False, hidden_size=48, num_heads=8, config=DyDiTConfig(token_router_ratio=4))
    loaded = load_dydit(save_pt(tmp_path / "b.pt", public_state(clear)))
    assert loaded.shape.num_heads == 8 and loaded.routing_config.always_on


def test_one_head_and_one_group_that_are_always_on(tmp_path: Path) -> None:
    model = small_dydit(mixed=False, num_heads=1)
    state = public_state(model)
    assert state["blocks.0.attn_rate.router.weight"].shape == (0, 32)
    model.save_pretrained(tmp_path / "folder")
    for loaded in (load_dydit(save_pt(tmp_path / "a.pt", state)), load_dydit(tmp_path / "folder")):
        assert loaded.shape == model.shape and loaded.routing_config.always_on


def test_scores_of_neither_release(tmp_path: Path) -> None:
    path = save_pt(tmp_path / "a.pt", public_state(small_dydit(mixed=False)))
    with pytest.raises(
        CheckpointError, match="3 scores for 16 heads; expected 16, or 15 with .*; pass num_heads"
    ):
        load_dydit(path, num_heads=16)


def test_a_token_router_of_no_whole_ratio(tmp_path: Path) -> None:
    state = public_state(small_dydit(mixed=False))
    for hidden in (13, 31, 40):
        state["blocks.0.token_selection.mlp_head.0.weight"] = torch.zeros(hidden, 32)
        assert f"a token router of {hidden} hidden units" in load_error(tmp_path, state)


def test_blocks_with_different_routers(tmp_path: Path) -> None:
    state = public_state(small_dydit(mixed=False))
    state["blocks.1.attn_rate.router.weight"] = torch.zeros(4, 32)
    assert "blocks.1.attn_rate.router.weight of shape (4, 32)" in load_error(tmp_path, state)
    del state["blocks.1.attn_rate.router.weight"]
    assert "lacks tensor blocks.1.attn_rate.router.weight" in load_error(tmp_path, state)


def load_error(folder: Path, state: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_dydit(save_pt(folder / "a.pt", state), num_heads=4)
    return str(caught.value)


def test_a_static_file_is_no_dydit(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="holds no routers; expected a DyDiT; load .* with load_backbone"
    ):
        load_dydit(save_pt(tmp_path / "a.pt", small_dit(**TINY).state_dict()))


def test_other_backbones_have_no_public_names() -> None:
    with pytest.raises(CheckpointError, match="a DyDiT around a DiTTransformer2DModel"):
        public_state(convert(small_diffusers()))
