"""``data.image_size`` left empty is the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core_builders import small_dit
from latent_builders import image_folder

from dydit.config import DataConfig, RunConfig, load_config
from dydit.errors import CheckpointError, ConfigError
from dydit.models.checkpoints import public_dit
from dydit.models.loading import load_backbone, stored_sample_size
from dydit.training import run_training
from dydit.training.image_size import SIZED, with_image_size

MakeConfig = Callable[..., RunConfig]
RGB = {"sample_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 4}


def test_a_folder_of_images_is_read_at_the_backbones_size(make_config: MakeConfig, tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")
    small_dit(in_channels=3).save_pretrained(tmp_path / "backbone")
    cfg = make_config(
        data={"name": "image_folder", "path": str(images), "batch_size": 4, "image_size": None},
        backbone=str(tmp_path / "backbone"),
        train={"steps": 2},
    )
    assert run_training(cfg).steps == 2
    written = load_config(Path(cfg.output_dir) / "config.yaml")
    assert written.data.image_size == 8 and written.data == with_image_size(cfg).data


@pytest.mark.parametrize("name", ["image_folder", "shapes"])
def test_pretraining_reads_images_at_the_size_of_its_model(
    make_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    data = {"name": name, "path": str(image_folder(tmp_path / "images"))}
    cfg = make_config(
        task="pretrain", backbone=None, model={**RGB, "num_classes": 10}, data=data, train={"steps": 1}
    )
    assert run_training(cfg).steps == 1


@pytest.mark.parametrize("name", [*SIZED, "digits", "latents"])
def test_only_what_has_no_size_gets_the_models(make_config: MakeConfig, name: Any) -> None:
    cfg = make_config(data={"name": name, "path": "somewhere"})
    assert with_image_size(cfg).data.image_size == (8 if name in SIZED else None)
    given = cfg.model_copy(update={"data": DataConfig(name=name, path="somewhere", image_size=16)})
    assert with_image_size(given) is given


def test_a_model_that_is_no_square_is_told(make_config: MakeConfig, tmp_path: Path) -> None:
    small_dit(sample_size=[4, 8]).save_pretrained(tmp_path / "wide")
    cfg = make_config(data={"name": "shapes"}, backbone=str(tmp_path / "wide"))
    with pytest.raises(ConfigError, match="empty for a model of 4 × 8; expected a square"):
        run_training(cfg)


@pytest.mark.parametrize("sample_size", [8, [4, 8]])
def test_the_stored_size_is_that_of_the_loaded_backbone(
    tmp_path: Path, sample_size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(public_dit.PUBLISHED_HEADS, (32, 2), 4)
    model = small_dit(sample_size=sample_size)
    model.save_pretrained(tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "file.pt")
    for place in (tmp_path / "folder", tmp_path / "file.pt"):
        assert stored_sample_size(place) == load_backbone(place).shape.sample_size == model.shape.sample_size
    with pytest.raises(CheckpointError, match="nowhere"):
        stored_sample_size(tmp_path / "nowhere")
