"""What a finished run exports: averaged weights alone, small, and readable everywhere."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core_builders import randomize, small_dit, small_inputs
from safetensors import safe_open

from dydit import DyDiT, convert, load_backbone, load_dydit
from dydit.config import DyDiTConfig, RunConfig
from dydit.models.dit import DiT
from dydit.models.fixed_positions import computed_positions
from dydit.models.pretrained import CACHE_LINE
from dydit.training import run_training
from dydit.training.loop import export_model

WEIGHTS = "diffusion_pytorch_model.safetensors"
WIDE = {"hidden_size": 64, "patch_size": 1, "in_channels": 1}


def stored(folder: Path) -> set[str]:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return set(file.keys())


def dynamic_model(dtype: torch.dtype = torch.float32, **arguments: Any) -> DyDiT:
    model = convert(small_dit(**{**WIDE, **arguments}), DyDiTConfig(token_router_ratio=4)).to(dtype).eval()
    randomize(model.dynamic_blocks, 1)
    return model


@pytest.mark.parametrize("task", ["finetune", "pretrain"])
def test_a_bfloat16_export_is_under_half_of_the_float32_weights_of_training(
    make_config: Callable[..., RunConfig], tmp_path: Path, task: str
) -> None:
    small_dit(**WIDE).save_pretrained(tmp_path / "wide")
    changes = {"backbone": str(tmp_path / "wide")} if task == "finetune" else {"backbone": None}
    model = {"sample_size": 8, "depth": 2, "num_heads": 4, "num_classes": 10, **WIDE}
    cfg = make_config(
        task=task, train={"steps": 1, "model_dtype": "bfloat16"},
        **changes, **({"model": model} if task == "pretrain" else {}),
    )  # fmt: skip
    result = run_training(cfg)
    assert result.model_dir is not None and result.checkpoint is not None
    exported = (result.model_dir / WEIGHTS).stat().st_size
    training = (result.checkpoint / "model.safetensors").stat().st_size
    assert 0.4 * training < exported < training / 2
    loaded = (load_dydit if task == "finetune" else load_backbone)(result.model_dir)
    assert all(p.dtype == torch.bfloat16 for p in loaded.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_every_way_of_loading_computes_what_was_left_out(
    tmp_path: Path, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = dynamic_model()
    folder = export_model(model, tmp_path / "model", dtype)
    assert "backbone.pos_embed" in model.state_dict() and "backbone.pos_embed" not in stored(folder)
    expected = model.backbone.pos_embed
    x, y = small_inputs(model.shape, batch=2)
    with caplog.at_level(logging.WARNING):
        ours = load_dydit(folder)
        theirs = DyDiT.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).eval()
    assert "newly initialized" not in caplog.text
    for loaded in (ours, theirs):
        torch.testing.assert_close(loaded.backbone.pos_embed.float(), expected, rtol=0, atol=2**-8)
        for name, tensor in model.named_parameters():
            assert torch.equal(loaded.get_parameter(name), tensor.to(getattr(torch, dtype))), name
    assert torch.equal(ours.backbone.pos_embed, expected)
    x = x.to(getattr(torch, dtype))
    # The last bits of products of few rows depend on where the weights start.
    assert all(p.data_ptr() % CACHE_LINE == 0 for p in theirs.parameters())
    assert torch.equal(ours(x, 500.0, y), theirs(x, 500.0, y))


def test_a_static_model_is_left_without_its_positions_too(tmp_path: Path) -> None:
    model = small_dit(**WIDE)
    folder = export_model(model, tmp_path / "model")
    assert stored(folder) == set(model.state_dict()) - {"pos_embed"}
    for loaded in (load_backbone(folder), DiT.from_pretrained(folder)):
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_files_that_hold_the_positions_are_read_as_before(tmp_path: Path) -> None:
    model = dynamic_model()
    model.save_pretrained(tmp_path / "model")
    assert "backbone.pos_embed" in stored(tmp_path / "model")
    for loaded in (load_dydit(tmp_path / "model"), DyDiT.from_pretrained(tmp_path / "model")):
        assert torch.equal(loaded.backbone.pos_embed, model.backbone.pos_embed)


@torch.no_grad()
def test_positions_of_a_models_own_are_kept(tmp_path: Path) -> None:
    model = dynamic_model()
    assert list(computed_positions(model)) == ["backbone.pos_embed"]
    model.backbone.pos_embed[0, 3, 5] += 0.25
    assert not computed_positions(model)
    folder = export_model(model, tmp_path / "model")
    assert torch.equal(load_dydit(folder).backbone.pos_embed, model.backbone.pos_embed)
    assert torch.equal(DyDiT.from_pretrained(folder).backbone.pos_embed, model.backbone.pos_embed)
