"""diffusers' own model and ours, on the same weights, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import WEIGHTS, edit_weights, same_weights, small_diffusers
from core_builders import relative_error, small_dit, small_inputs
from diffusers import DDIMScheduler, DiTTransformer2DModel

from dydit.errors import CheckpointError
from dydit.models.checkpoints.diffusers_layout import LEGACY_SETTINGS, timestep_drift
from dydit.models.checkpoints.writing import to_diffusers, write_diffusers, write_public
from dydit.models.dit import DiT
from dydit.models.loading import load_backbone, stored_class

T = torch.tensor([0, 250, 999])
EXACT: dict[str, Any] = {"frequency_shift": 1.0, "mlp_norm_eps": 1e-5}


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    small_diffusers().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"out_channels": 3},
        {"out_channels": None, "num_embeds_ada_norm": 1},
        {"patch_size": 4, "norm_eps": 1e-2, "num_layers": 3, "in_channels": 4, "out_channels": 8},
        {"num_attention_heads": 1, "attention_head_dim": 12, "upcast_attention": True, "norm_num_groups": 4},
    ],
)
@torch.no_grad()
def test_our_model_computes_what_diffusers_does(tmp_path: Path, overrides: dict[str, Any]) -> None:
    theirs = small_diffusers(**overrides)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_backbone(tmp_path / "theirs")
    x, y = small_inputs(ours.shape, batch=2)
    expected = theirs(x, timestep=T[:2], class_labels=y).sample
    assert relative_error(ours(x, T[:2], y), expected) < 1e-5


@pytest.mark.parametrize("overrides", [{}, {"learn_sigma": False, "patch_size": 4}, {"mlp_norm_eps": 1e-6}])
@torch.no_grad()
def test_diffusers_computes_what_our_model_does(tmp_path: Path, overrides: dict[str, Any]) -> None:
    ours = small_dit(**{**EXACT, **overrides})
    assert write_diffusers(ours, tmp_path / "theirs") == ""
    assert not (tmp_path / "theirs" / "README.md").exists()
    theirs, info = DiTTransformer2DModel.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values())
    x, y = small_inputs(ours.shape)
    expected = theirs.eval()(x, timestep=T, class_labels=y).sample
    assert relative_error(ours(x, T, y), expected) < 1e-5


def test_there_and_back_is_bit_equal(folder: Path, tmp_path: Path) -> None:
    ours = load_backbone(folder)
    write_diffusers(ours, tmp_path / "again")
    theirs = DiTTransformer2DModel.from_pretrained(folder).state_dict()
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "again").state_dict()
    assert theirs.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in theirs.items())
    write_public(ours, tmp_path / "public")
    assert same_weights(load_backbone(tmp_path / "public"), ours)
    assert load_backbone(tmp_path / "public").config.frequency_shift == 1.0


def test_a_pipelines_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    DDIMScheduler().save_pretrained(tmp_path / "pipeline" / "scheduler")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    folder.rename(tmp_path / "pipeline" / "transformer")
    assert load_backbone(tmp_path / "pipeline").shape.depth == 2
    assert stored_class(tmp_path / "pipeline") == "DiTTransformer2DModel"


def test_the_first_published_folders_class(folder: Path) -> None:
    """They name Transformer2DModel, with settings that change nothing here, and hold a pickle."""
    expected = load_backbone(folder)
    edit_config(folder, _class_name="Transformer2DModel", **LEGACY_SETTINGS)
    assert same_weights(load_backbone(folder), expected)
    theirs = DiTTransformer2DModel.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    torch.save(theirs.state_dict(), folder / "diffusion_pytorch_model.bin")
    assert same_weights(load_backbone(folder), expected)
    edit_config(folder, num_vector_embeds=100)
    with pytest.raises(CheckpointError, match="no setting 'num_vector_embeds'"):
        load_backbone(folder)


@pytest.mark.parametrize("leaf", ["timestep_embedder.linear_1.bias", "class_embedder.embedding_table.weight"])
def test_unequal_copies_of_an_embedder_are_refused_by_name(folder: Path, leaf: str) -> None:
    name = f"transformer_blocks.1.norm1.emb.{leaf}"
    edit_weights(folder, **{name: DiTTransformer2DModel.from_pretrained(folder).state_dict()[name] + 1})
    with pytest.raises(
        CheckpointError, match=rf"transformer_blocks\.1.*{leaf} differs from transformer_blocks\.0"
    ):
        load_backbone(folder)


def test_every_copy_has_to_be_there(folder: Path) -> None:
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.weight"
    edit_weights(folder, **{name: None})
    with pytest.raises(CheckpointError, match=f"lacks tensor {name}"):
        load_backbone(folder)


def test_a_part_of_a_fused_layer_of_another_shape(folder: Path) -> None:
    edit_weights(folder, **{"transformer_blocks.0.attn1.to_k.weight": torch.zeros(31, 32)})
    with pytest.raises(CheckpointError, match=r"to_k\.weight of shape \(31, 32\); expected \(32, 32\)"):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("overrides", "seen"),
    [
        ({"activation_fn": "gelu"}, "activation_fn is 'gelu'; expected 'gelu-approximate'"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine is True"),
        ({"dropout": 0.5}, "dropout is 0.5"),
        ({"out_channels": 4}, "out_channels is 4; expected 3 or 6"),
        ({"sample_size": 9}, "patch_size 2 does not divide sample_size 9"),
    ],
)
def test_settings_that_are_no_dit_are_refused(tmp_path: Path, overrides: dict[str, Any], seen: str) -> None:
    small_diffusers(**overrides).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=seen):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"num_layer": 2}, "no setting 'num_layer'; did you mean 'num_layers'"),
        ({"norm_eps": "small"}, "norm_eps is 'small'; expected <class 'float'>"),
        ({"num_layers": 10**9}, "num_layers is 1000000000, with"),
        ({"num_layers": True}, "num_layers is True"),
        ({"norm_type": "ada_norm"}, "norm_type is 'ada_norm'"),
        ({"num_embeds_ada_norm": None}, "cannot be built"),
        ({"sample_size": 2**16}, "asks for pos_embed of shape .*; check sample_size and patch_size"),
        (
            {"_class_name": "PixArtTransformer2DModel"},
            "holds a PixArtTransformer2DModel; expected one of DiT",
        ),
        ({"_class_name": 3}, "names no class"),
    ],
)
def test_a_damaged_config(folder: Path, changes: dict[str, Any], seen: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=seen):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"conditioning": "adaln"}, "its conditioning is adaln"),
        ({"sample_size": (8, 4)}, r"its latents of \(8, 4\) are not square"),
        ({"null_class": False}, "it has no null class"),
        ({"mlp_ratio": 3.0}, "its MLP is not 4 times as wide"),
    ],
)
def test_what_diffusers_cannot_compute_is_refused(
    tmp_path: Path, overrides: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=f"cannot compute this DiT: {reason}"):
        write_diffusers(small_dit(**{**EXACT, **overrides}), tmp_path / "out", allow_inexact=True)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_learned_positions_are_refused() -> None:
    ours = small_dit(**EXACT)
    ours.pos_embed[0, 3, 5] += 0.01
    with pytest.raises(CheckpointError, match="position embedding is not the plain sine-cosine one"):
        to_diffusers(ours)
    half = small_dit(**EXACT).to(torch.bfloat16)
    assert to_diffusers(half).dtype == torch.bfloat16


def test_other_frequencies_are_refused_or_noted(tmp_path: Path) -> None:
    ours = small_dit()
    drift = timestep_drift(ours)
    assert 0.01 < drift < 2 and timestep_drift(small_dit(**EXACT)) == 0
    with pytest.raises(
        CheckpointError, match=rf"have shift 0; .* by {drift:.1%}; expected shift 1.*allow an inexact"
    ):
        write_diffusers(ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    note = write_diffusers(ours, tmp_path / "out", allow_inexact=True)
    assert f"Not exact: .*{drift:.1%}".split(".*")[0] in note and f"{drift:.1%}" in note
    assert note in (tmp_path / "out" / "README.md").read_text()
    assert isinstance(load_backbone(tmp_path / "out"), DiT)
