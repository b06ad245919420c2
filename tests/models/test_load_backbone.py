from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from core_builders import small_dit, small_dydit, small_inputs
from safetensors.torch import load_file, save_file

from dydit.errors import CheckpointError
from dydit.models.dit import DiT
from dydit.models.loading import load_backbone
from dydit.shapes import CONDITIONINGS

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    small_dit().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_round_trip_is_bit_equal(conditioning: str, tmp_path: Path) -> None:
    model = small_dit(conditioning=conditioning, sample_size=(8, 4), learn_sigma=False)
    model.save_pretrained(tmp_path / "model")
    loaded = load_backbone(tmp_path / "model")
    assert type(loaded) is DiT and not loaded.training
    assert loaded.shape == model.shape
    x, y = small_inputs(model.shape)
    assert torch.equal(loaded(x, 500.0, y), model(x, 500.0, y))


def test_loads_in_another_dtype(folder: Path) -> None:
    assert next(load_backbone(str(folder), dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_shards_are_put_together(tmp_path: Path) -> None:
    model = small_dit()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_backbone(tmp_path)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./one", "../one/two"])
def test_a_missing_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"no model .*{name}; expected .*; check the path"):
        load_backbone(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json"):
        load_backbone(tmp_path)


def test_truncated_weights(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        (folder / WEIGHTS).write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="copy or download it again"):
            load_backbone(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load_backbone(folder)


def test_another_class(tmp_path: Path) -> None:
    small_dydit().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a DyDiT; .*load_dydit"):
        load_backbone(tmp_path)


def edit_tensors(folder: Path, drop: str | None = None, **extra: torch.Tensor) -> None:
    tensors = load_file(folder / WEIGHTS)
    if drop is not None:
        del tensors[drop]
    save_file({**tensors, **extra}, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_tensor_left_over_is_named(folder: Path) -> None:
    edit_tensors(folder, stray=torch.zeros(2))
    with pytest.raises(CheckpointError, match="unknown tensor stray"):
        load_backbone(folder)


def test_a_tensor_that_lacks_is_named(folder: Path) -> None:
    edit_tensors(folder, drop="blocks.1.mlp.fc1.weight")
    with pytest.raises(CheckpointError, match=r"lacks tensor blocks\.1\.mlp\.fc1\.weight"):
        load_backbone(folder)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    edit_tensors(folder, **{"blocks.0.attn.proj.bias": torch.zeros(33)})
    with pytest.raises(CheckpointError, match="proj.bias"):
        load_backbone(folder)


@pytest.mark.parametrize("change", [{"depth": 3}, {"num_heads": 5}, {"conditioning": "film"}])
def test_a_config_that_does_not_fit_the_weights(folder: Path, change: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError):
        load_backbone(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_broken_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        load_backbone(folder)
