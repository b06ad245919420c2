"""Small models on disk, and the command line called in this process (importing torch takes seconds)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import dydit
from dydit.cli.app import main


@dataclass(frozen=True)
class Outcome:
    """Exit status and both streams of one command."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a mistake; anything else on the way fails the test."""
        assert self.status == 2, (self.status, self.err)
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        return self.err


Command = Callable[..., Outcome]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> Outcome:
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


@dataclass(frozen=True)
class Models:
    """Folders of a static model, a DyDiT made of it, and a DyDiT with other weights."""

    static: Path
    dynamic: Path
    other: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(devices=[]):
        for seed, name in ((0, "dynamic"), (1, "other")):
            torch.manual_seed(seed)
            static = dydit.DiT(
                sample_size=8,
                patch_size=2,
                in_channels=1,
                hidden_size=32,
                depth=2,
                num_heads=4,
                num_classes=10,
            )
            _stir(static.parameters(), 0.1)
            static.save_pretrained(folder / "static")
            dynamic = dydit.convert(static, dydit.DyDiTConfig(open_bias=0.0, token_open_bias=0.0))
            _stir(dynamic.router_parameters(), 1.0)
            dynamic.save_pretrained(folder / name)
    return Models(folder / "static", folder / "dynamic", folder / "other")


@torch.no_grad()
def _stir(parameters: Iterable[torch.nn.Parameter], scale: float) -> None:
    """A fresh model answers zero and routes nothing; move it away from there."""
    for parameter in parameters:
        parameter.add_(scale * torch.randn_like(parameter))


@pytest.fixture(scope="session")
def exported(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the dynamic model for four steps of DDIM, with its weights."""
    folder = tmp_path_factory.mktemp("exports") / "ddim"
    assert main(["export", str(models.dynamic), "--out", str(folder), "--steps", "4", "--with-weights"]) == 0
    return folder


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """A folder that nobody can make, root included: its parent is a file."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "folder"


@pytest.fixture
def finetune_yaml(models: Models, tmp_path: Path) -> Path:
    """Two steps of fine-tuning into ``run`` beside the file."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""\
task: finetune
output_dir: {tmp_path / "run"}
backbone: {models.static}
data: {{batch_size: 4}}
train: {{steps: 2, save_every: 1, log_every: 1}}
compute: {{target: 0.9}}
sampler: {{steps: 3, guided_channels: 1}}
"""
    )
    return path
