"""``load_backbone`` as a whole: where it looks, what it costs, what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from core_builders import small_dit, small_dydit
from safetensors.torch import load_file, save_file

import dydit
from dydit.errors import CheckpointError
from dydit.models.dit import DiT
from dydit.models.loading import load_backbone, stored_class

TOOL = Path(dydit.__file__).parent.parent / "tools" / "measure_loading.py"


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    small_dit().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_large_file_takes_one_copy_of_its_weights(tmp_path: Path) -> None:
    """DiT-XL/2 itself is measured with the same tool; see docs/checkpoints.md."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in DiT.from_preset("DiT-S/2").state_dict().items()}
    raw, averaged = (
        {name: torch.full(shape, 0.5, dtype=torch.float16) for name, shape in shapes.items()}
        for _ in range(2)
    )
    torch.save({"model": raw, "ema": averaged}, tmp_path / "a.pt")  # what is not asked for is not read
    done = subprocess.run(
        [sys.executable, str(TOOL), "--file", str(tmp_path / "a.pt")],
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(done.stdout)
    assert figures["weight_bytes"] == sum(2 * shape.numel() for shape in shapes.values())
    # Modules and code that come with the first load weigh nothing beside 2.7 GB, but do beside 66 MB.
    assert figures["peak_rise_bytes"] < 1.1 * figures["weight_bytes"] + 30e6


def test_loading_draws_no_random_numbers(folder: Path, tmp_path: Path) -> None:
    torch.save(small_dit().state_dict(), tmp_path / "a.pt")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load_backbone(folder)
    load_backbone(tmp_path / "a.pt", num_heads=4)
    assert torch.equal(torch.rand(1), expected)


def test_a_loaded_model_trains_and_saves_without_touching_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(small_dit().state_dict(), path)
    content = path.read_bytes()
    model = load_backbone(path, num_heads=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path / "saved")
    assert path.read_bytes() == content
    saved = load_backbone(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


def test_the_folder_may_be_replaced_while_its_model_lives(folder: Path) -> None:
    model = load_backbone(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for file in folder.iterdir():
        file.write_bytes(b"")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_numbers_that_a_folder_states_otherwise_are_refused(folder: Path) -> None:
    assert load_backbone(folder, num_heads=4, sample_size=8).shape == small_dit().shape
    with pytest.raises(CheckpointError, match="num_heads 8 asked of .*; expected 4, as its config.json has"):
        load_backbone(folder, num_heads=8)
    with pytest.raises(CheckpointError, match=r"sample_size \(8, 4\) asked"):
        load_backbone(folder, sample_size=(8, 4))


def test_a_hub_id_is_fetched_and_then_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], any(p.endswith(".bin") for p in options["allow_patterns"])))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert load_backbone("owner/name", revision="v1").shape.depth == 2
    assert asked == [("owner/name", "v1", False)]
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert load_backbone("owner/name").shape.depth == 2
    assert asked[1:] == [("owner/name", None, False), ("owner/name", None, True)]


def test_another_part_of_the_pipeline_does_not_stand_for_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All downloads of a commit share a folder: its VAE may be there from before."""
    pipeline, asked = tmp_path / "pipeline", []
    (pipeline / "vae").mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    folder.rename(pipeline / "transformer")
    weights = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()

    def fetch(name: str, **options: Any) -> str:
        asked.append(any(pattern.endswith(".bin") for pattern in options["allow_patterns"]))
        return str(pipeline)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert load_backbone("owner/name").shape.depth == 2
    assert asked == [False, True]


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"owner/name is no local path .*\(no route\); check the name"):
        load_backbone("owner/name")


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", ""])
def test_what_can_be_no_path(path: str) -> None:
    with pytest.raises(CheckpointError):
        load_backbone(path)


def test_stored_class_looks_without_loading(folder: Path, tmp_path: Path) -> None:
    assert stored_class(folder) == "DiT"
    small_dydit(mixed=False).save_pretrained(tmp_path / "dynamic")
    (tmp_path / "dynamic" / "diffusion_pytorch_model.safetensors").unlink()
    assert stored_class(tmp_path / "dynamic") == "DyDiT"


@pytest.mark.parametrize("name", ["../model.safetensors", "absent.safetensors", 3, None, "x" * 5000])
def test_an_index_that_names_other_places(folder: Path, name: Any) -> None:
    index = {"metadata": {}, "weight_map": {"a": name}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names .*; expected a file beside it|cannot be read"):
        load_backbone(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, []])
def test_a_broken_index(folder: Path, index: Any) -> None:
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no weight_map|holds a list"):
        load_backbone(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    name = "diffusion_pytorch_model.safetensors"
    (folder / "again.safetensors").write_bytes((folder / name).read_bytes())
    index = {"weight_map": {"a": name, "b": "again.safetensors"}}
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="twice"):
        load_backbone(folder)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="no config.json"):
        load_backbone(tmp_path)
