"""Fine-tuning a backbone on data with another number of classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit.config import RunConfig
from dydit.errors import DataError
from dydit.models.dit import DiT
from dydit.models.loading import load_backbone
from dydit.training import run, run_training

MakeConfig = Callable[..., RunConfig]
SHORT = {"train": {"steps": 2}}


@pytest.fixture
def seven_classes(backbone_folder: Path, tmp_path: Path) -> str:
    """The tiny backbone with a label table of seven classes; the digits have ten."""
    small = load_backbone(backbone_folder, num_classes=7, on_class_mismatch="drop")
    small.save_pretrained(tmp_path / "seven")
    return str(tmp_path / "seven")


def table(model: Any) -> torch.Tensor:
    return model.y_embedder.embedding_table.weight.detach()


def test_keep_refuses_a_table_that_is_too_small_and_says_what_to_do(
    make_config: MakeConfig, seven_classes: str
) -> None:
    with pytest.raises(
        DataError, match="10 classes; expected at most the model's 7; set on_class_mismatch=drop"
    ):
        run_training(make_config(backbone=seven_classes, **SHORT))


def test_drop_trains_with_a_fresh_table_for_the_classes_of_the_data(
    make_config: MakeConfig, seven_classes: str
) -> None:
    result = run_training(make_config(backbone=seven_classes, on_class_mismatch="drop", **SHORT))
    assert result.model.shape.num_classes == result.model.null_label == 10
    assert len(table(result.model.backbone)) == 11


def test_drop_makes_no_table_for_a_stray_label(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a class map, here, of which nobody but the data set knows."""
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "cat" / "1.png").write_bytes(b"")
    (tmp_path / "data" / "classes.json").write_text('{"cat": 1000000000}')
    monkeypatch.setattr(run, "load_backbone", None)  # not even called
    data = {"name": "image_folder", "path": str(tmp_path / "data"), "image_size": 8}
    with pytest.raises(
        DataError, match=r"gives cat the label 1000000000; expected a whole number from 0 to 999,999"
    ):
        run_training(make_config(on_class_mismatch="drop", data=data))


@pytest.mark.parametrize("choice", ["keep", "drop"])
def test_a_table_that_fits_stays(make_config: MakeConfig, backbone_folder: Path, choice: str) -> None:
    cfg = make_config(on_class_mismatch=choice, train={"steps": 1, "lr": 1e-12})
    trained = run_training(cfg).model.backbone
    torch.testing.assert_close(table(trained), table(DiT.from_pretrained(backbone_folder)), rtol=0, atol=1e-9)
