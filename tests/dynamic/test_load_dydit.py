from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from core_builders import TIMESTEPS, small_dit, small_dydit, small_inputs
from safetensors.torch import load_file, save_file

from dydit.config import DyDiTConfig
from dydit.dynamic.loading import load_dydit
from dydit.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    small_dydit().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "config",
    [
        DyDiTConfig(token_router_ratio=4),
        DyDiTConfig(token_router_ratio=4, mlp_groups=8, always_on=False, token_threshold=0.3),
        DyDiTConfig(token_routing=False),
        DyDiTConfig(head_routing=False, mlp_routing=False),
    ],
)
def test_round_trip_is_bit_equal(config: DyDiTConfig, tmp_path: Path) -> None:
    model = small_dydit(config=config)
    model.save_pretrained(tmp_path)
    loaded = load_dydit(tmp_path)
    assert not loaded.training and loaded.routing_config == config
    x, y = small_inputs(model.shape)
    t = torch.tensor(TIMESTEPS)
    assert torch.equal(loaded(x, t, y), model(x, t, y))


def test_missing_folder_and_truncated_weights(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no model .*elsewhere"):
        load_dydit(folder / "elsewhere")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="copy or download it again"):
        load_dydit(folder)


def test_a_static_model_is_refused(tmp_path: Path) -> None:
    small_dit().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a DiT; expected a DyDiT"):
        load_dydit(tmp_path)


@pytest.mark.parametrize("name", ["stray", "dynamic_blocks.0.routers.head_router.router.bias"])
def test_tensors_have_to_fit_exactly(folder: Path, name: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    if name in tensors:
        del tensors[name]
    else:
        tensors[name] = torch.zeros(2)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        load_dydit(folder)


def test_a_config_with_an_unknown_setting_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["dydit"]["tresholds"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="tresholds"):
        load_dydit(folder)
