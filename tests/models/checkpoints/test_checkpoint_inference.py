"""Every number of a public file is read off its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import TINY, same_weights, save_pt
from core_builders import small_dit

from dydit.errors import CheckpointError
from dydit.models.checkpoints.public_dit import PUBLISHED_HEADS, infer_arguments
from dydit.models.checkpoints.sources import TensorFacts
from dydit.models.dit import DiT
from dydit.models.embeddings import sincos_position_embedding
from dydit.models.loading import load_backbone


class FactsOnly:
    """A source that knows shapes and has no values but a position embedding."""

    label = "file.pt"

    def __init__(self, model: DiT) -> None:
        state = model.state_dict()
        self.facts = {name: TensorFacts(tuple(t.shape), "float32") for name, t in state.items()}
        self.positions = sincos_position_embedding(model.shape.hidden_size, model.shape.grid)

    def read(self, name: str) -> torch.Tensor:
        assert name == "pos_embed"
        return self.positions


@pytest.mark.parametrize(
    ("preset", "sample_size"),
    [("DiT-S/2", 32), ("DiT-S/8", [32, 64]), ("DiT-B/4", [64, 32]), ("DiT-L/8", 32), ("DiT-XL/2", 64)],
)
def test_published_sizes(preset: str, sample_size: Any) -> None:
    with torch.device("meta"):
        model = DiT.from_preset(preset, sample_size=sample_size)
    arguments = infer_arguments(FactsOnly(model))
    with torch.device("meta"):
        assert DiT(**arguments).shape == model.shape


@pytest.mark.parametrize(
    "overrides",
    [
        {"sample_size": (4, 12)},
        {"sample_size": (12, 4), "patch_size": 4, "in_channels": 1},
        {"learn_sigma": False, "mlp_ratio": 2.0},
        {"hidden_size": 48, "mlp_ratio": 2.7, "num_heads": 1, "num_classes": 1},
        {"conditioning": "adaln", "depth": 12},
        {"conditioning": "in_context"},
        {"conditioning": "cross_attention"},
    ],
)
@torch.no_grad()
def test_other_shapes_and_designs(tmp_path: Path, overrides: dict[str, Any]) -> None:
    model = small_dit(**{**TINY, **overrides})
    path = save_pt(tmp_path / "a.pt", model.state_dict())
    loaded = load_backbone(path, num_heads=model.shape.num_heads)
    assert loaded.shape == model.shape and same_weights(loaded, model)


def test_heads_of_no_published_size_have_to_be_given(tmp_path: Path) -> None:
    path = save_pt(tmp_path / "a.pt", small_dit(**TINY).state_dict())
    with pytest.raises(
        CheckpointError, match="1 blocks of width 16, which is no published size.*; pass num_heads"
    ):
        load_backbone(path)
    with pytest.raises(CheckpointError, match="num_heads 5 does not divide"):
        load_backbone(path, num_heads=5)
    assert PUBLISHED_HEADS == {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}


def test_positions_of_no_grid(tmp_path: Path) -> None:
    model = small_dit(**{**TINY, "sample_size": (4, 8)})
    learned = {**model.state_dict(), "pos_embed": torch.randn(1, 8, 16)}
    path = save_pt(tmp_path / "a.pt", learned)
    with pytest.raises(CheckpointError, match="8 positions, which is no square.*; pass sample_size"):
        load_backbone(path, num_heads=2)
    loaded = load_backbone(path, num_heads=2, sample_size=(4, 8))
    assert loaded.shape == model.shape and torch.equal(loaded.pos_embed, learned["pos_embed"])
    with pytest.raises(CheckpointError, match="pos_embed"):
        load_backbone(path, num_heads=2, sample_size=16)
    square = {**small_dit(**TINY).state_dict(), "pos_embed": torch.randn(1, 4, 16)}
    assert load_backbone(save_pt(tmp_path / "b.pt", square), num_heads=2).shape.sample_size == (4, 4)


def test_a_size_that_contradicts_the_positions_is_refused(tmp_path: Path) -> None:
    path = save_pt(tmp_path / "a.pt", small_dit(**{**TINY, "sample_size": (4, 8)}).state_dict())
    with pytest.raises(
        CheckpointError, match=r"sample_size \[8, 4\].*expected \[4, 8\], as its pos_embed has"
    ):
        load_backbone(path, num_heads=2, sample_size=(8, 4))


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"blocks.0.mlp.fc1.weight": "blocks.2.mlp.fc1.weight"}, "lacks block 1"),
        (
            {"y_embedder.embedding_table.weight": "y_embedder.table"},
            "lacks tensor y_embedder.embedding_table",
        ),
        ({"blocks.0.adaLN_modulation.1.weight": "blocks.0.mod"}, "conditioning design cannot be told"),
        ({"final_layer.linear.weight": torch.zeros(17, 16)}, "17 outputs; expected 12 .*or 24"),
        ({"x_embedder.proj.weight": torch.zeros(16, 12)}, r"shape \(16, 12\); expected 4 sizes"),
        ({"x_embedder.proj.weight": torch.zeros(16, 3, 0, 0)}, "expected 4 sizes"),
        ({"blocks.0.adaLN_modulation.1.weight": torch.zeros(50, 16)}, "conditioning design cannot be told"),
    ],
)
def test_what_cannot_be_told_is_named(tmp_path: Path, changes: dict[str, Any], seen: str) -> None:
    state = dict(small_dit(**TINY).state_dict())
    for name, change in changes.items():
        if isinstance(change, str):
            state[change] = state.pop(name)
        else:
            state[name] = change
    with pytest.raises(CheckpointError, match=seen):
        load_backbone(save_pt(tmp_path / "a.pt", state), num_heads=2)
