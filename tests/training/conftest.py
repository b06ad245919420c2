"""A tiny backbone on disk, and runs of it that take a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit.config import RunConfig
from dydit.models.dit import DiT

TINY = {
    "sample_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 4,
    "num_classes": 10,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DiT for digits whose output is not zero, as a freshly initialised one's would be."""
    folder = tmp_path_factory.mktemp("backbone")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiT(**TINY)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def make_config(backbone_folder: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """``make_config("run", train={"steps": 3}, seed=1)``: a finetune run into ``tmp_path / "run"``."""

    def make(name: str = "run", **changes: Any) -> RunConfig:
        settings: dict[str, Any] = {
            "task": "finetune",
            "output_dir": str(tmp_path / name),
            "backbone": str(backbone_folder),
            "dydit": {"open_bias": 2.0, "token_open_bias": 2.0, "temperature": 1.0},
            "data": {"batch_size": 8, "flip": True},
            "train": {"steps": 12, "lr": 1e-3, "clip_norm": 1.0, "log_every": 5, "save_every": 4},
            "compute": {"target": 0.6, "ramp_steps": 4},
            "warmup": {"mode": "complete", "steps": 6, "fraction": 0.5},
        }
        for key, value in changes.items():
            settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
        return RunConfig(**settings)

    return make


@pytest.fixture
def pretrain_config(make_config: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """As ``make_config``, for the static model."""

    def make(name: str = "run", **changes: Any) -> RunConfig:
        return make_config(name, task="pretrain", backbone=None, model=TINY, **changes)

    return make
