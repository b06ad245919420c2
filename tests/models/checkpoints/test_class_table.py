"""Fine-tuning on other classes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from checkpoint_builders import TINY, same_weights, save_pt, small_diffusers
from core_builders import small_dit, small_inputs

from dydit.errors import CheckpointError
from dydit.models.checkpoints.class_table import LABEL_TABLE, with_classes
from dydit.models.loading import load_backbone


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    small_dit(**TINY).save_pretrained(tmp_path)
    return tmp_path


def test_as_many_classes_keep_the_table(folder: Path) -> None:
    for choice in ("error", "drop"):
        assert same_weights(load_backbone(folder, num_classes=3, on_class_mismatch=choice), small_dit(**TINY))


def test_another_number_is_refused_by_default(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="has 3 classes; expected 7; .*on_class_mismatch='drop'"):
        load_backbone(folder, num_classes=7)
    with pytest.raises(CheckpointError, match="expected 'error' or 'drop'"):
        load_backbone(folder, num_classes=7, on_class_mismatch="keep")
    with pytest.raises(CheckpointError, match="expected 0"):
        load_backbone(folder, num_classes=0, on_class_mismatch="drop")


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_a_fresh_table_is_said_and_keeps_only_the_null_class(
    folder: Path, classes: int, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="dydit"):
        model = load_backbone(folder, num_classes=classes, on_class_mismatch="drop")
    assert f"label table of 3 classes dropped: {classes} fresh rows" in caplog.text
    before, after = small_dit(**TINY).state_dict(), model.state_dict()
    table = after.pop(LABEL_TABLE)
    assert torch.equal(table[-1], before.pop(LABEL_TABLE)[-1])
    assert table.shape == (classes + 1, 16) and 0.005 < table[:-1].std() < 0.05
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert model.shape.num_classes == model.null_label == classes and not model.training
    x, y = small_inputs(model.shape, batch=2)
    assert model(x, 5.0, y).isfinite().all()


def test_the_resized_model_round_trips(folder: Path, tmp_path: Path) -> None:
    model = load_backbone(folder, num_classes=5, on_class_mismatch="drop", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "new")
    loaded = load_backbone(tmp_path / "new", num_classes=5)
    assert loaded.dtype == torch.bfloat16 and same_weights(loaded, model)


def test_files_and_diffusers_folders_too(tmp_path: Path) -> None:
    path = save_pt(tmp_path / "a.pt", small_dit(**TINY).state_dict())
    assert load_backbone(path, num_heads=2, num_classes=2, on_class_mismatch="drop").shape.num_classes == 2
    small_diffusers().save_pretrained(tmp_path / "theirs")
    model = load_backbone(tmp_path / "theirs", num_classes=2, on_class_mismatch="drop")
    assert model.shape.num_classes == 2 and model.config.frequency_shift == 1.0


def test_a_model_without_a_null_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = small_dit(**TINY, null_class=False)
    path = save_pt(tmp_path / "a.pt", model.state_dict())
    assert same_weights(load_backbone(path, num_heads=2, null_class=False, num_classes=3), model)
    assert load_backbone(path, num_heads=2).shape.num_classes == 2  # as published files mean it
    with caplog.at_level(logging.WARNING, logger="dydit"):
        resized = load_backbone(path, num_heads=2, null_class=False, num_classes=5, on_class_mismatch="drop")
    assert resized.state_dict()[LABEL_TABLE].shape == (5, 16) and resized.null_label is None
    assert "nothing is kept" in caplog.text
    model.save_pretrained(tmp_path / "folder")
    assert load_backbone(tmp_path / "folder").shape == model.shape
    with pytest.raises(CheckpointError, match="null_class True asked of .*; expected False"):
        load_backbone(tmp_path / "folder", null_class=True)


def test_text_has_no_classes() -> None:
    with pytest.raises(CheckpointError, match="conditioned on text"):
        with_classes(small_dit(conditioning="adaln_single"), 7, "drop")
