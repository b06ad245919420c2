"""``dydit convert-checkpoint``: there, back, and what is refused with nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core_builders import small_dit, small_dydit
from diffusers import DiTTransformer2DModel

from dydit.dynamic.loading import load_dydit, public_state
from dydit.models.loading import load_backbone

EXACT: dict[str, Any] = {"frequency_shift": 1.0, "mlp_norm_eps": 1e-5}


@pytest.fixture()
def public(tmp_path: Path) -> Path:
    torch.save({"ema": small_dit().state_dict()}, tmp_path / "public.pt")
    return tmp_path / "public.pt"


def test_a_public_file_becomes_a_folder(command: Any, public: Path, tmp_path: Path) -> None:
    outcome = command("convert-checkpoint", public, tmp_path / "out", "--num-heads", 4)
    assert outcome.status == 0
    assert outcome.out.startswith(
        f"{tmp_path / 'out'}: public layout, from {public} (DiT): 2 blocks, width 32"
    )
    state = load_backbone(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in small_dit().state_dict().items())


def test_to_diffusers_and_back(command: Any, tmp_path: Path) -> None:
    ours = small_dit(**EXACT)
    ours.save_pretrained(tmp_path / "ours")
    assert (
        command("convert-checkpoint", tmp_path / "ours", tmp_path / "theirs", "--to", "diffusers").status == 0
    )
    assert DiTTransformer2DModel.from_pretrained(tmp_path / "theirs").config.num_layers == 2
    assert command("convert-checkpoint", tmp_path / "theirs", tmp_path / "again").status == 0
    state = load_backbone(tmp_path / "again").state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.allclose(tensor, state[name], rtol=0, atol=1e-6 if name == "pos_embed" else 0)


def test_an_inexact_conversion_has_to_be_allowed(command: Any, public: Path, tmp_path: Path) -> None:
    words = ("convert-checkpoint", public, tmp_path / "out", "--to", "diffusers", "--num-heads", 4)
    assert "timestep frequencies have shift 0" in command(*words).error
    assert not (tmp_path / "out").exists()
    outcome = command(*words, "--allow-inexact")
    assert outcome.status == 0 and "Not exact" in outcome.out
    assert (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("words", [(), ("--to", "dydit")])
def test_a_public_dydit_file(command: Any, tmp_path: Path, words: tuple[str, ...]) -> None:
    model = small_dydit(mixed=False)
    torch.save(public_state(model), tmp_path / "a.pt")
    outcome = command("convert-checkpoint", tmp_path / "a.pt", tmp_path / "out", "--num-heads", 4, *words)
    assert outcome.status == 0 and "dydit layout" in outcome.out and "(DyDiT)" in outcome.out
    assert load_dydit(tmp_path / "out").shape == model.shape


def test_layouts_that_cannot_hold_the_model(command: Any, public: Path, tmp_path: Path) -> None:
    small_dydit(mixed=False).save_pretrained(tmp_path / "dynamic")
    error = command("convert-checkpoint", tmp_path / "dynamic", tmp_path / "out", "--to", "diffusers").error
    assert "a DyDiT has routers" in error
    error = command("convert-checkpoint", public, tmp_path / "out", "--to", "dydit", "--num-heads", 4).error
    assert "no routers to write" in error
    assert not (tmp_path / "out").exists()


def test_mistakes(command: Any, public: Path, tmp_path: Path, blocked: Path) -> None:
    assert "pass num_heads" in command("convert-checkpoint", public, tmp_path / "out").error
    assert "no model at" in command("convert-checkpoint", tmp_path / "nothing.pt", tmp_path / "out").error
    assert "expected a new or empty folder" in command("convert-checkpoint", public, public).error
    for size in ("a", "8x8x8", "8x", "-8"):
        words = ("convert-checkpoint", public, tmp_path / "out", f"--sample-size={size}")
        assert "expected 32, or 32x64" in command(*words).error
    assert "cannot be written" in command("convert-checkpoint", public, blocked, "--num-heads", 4).error
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_null_class(command: Any, tmp_path: Path) -> None:
    model = small_dit(null_class=False)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    words = ("convert-checkpoint", tmp_path / "a.pt", tmp_path / "out", "--num-heads", 4, "--no-null-class")
    assert command(*words).status == 0
    assert load_backbone(tmp_path / "out").shape == model.shape


def test_a_size_that_the_file_does_not_tell(command: Any, tmp_path: Path) -> None:
    state = small_dit(sample_size=(4, 8)).state_dict()
    torch.save({**state, "pos_embed": torch.zeros_like(state["pos_embed"])}, tmp_path / "a.pt")
    words = ("convert-checkpoint", tmp_path / "a.pt", tmp_path / "out", "--num-heads", 4)
    assert "pass sample_size" in command(*words).error
    assert command(*words, "--sample-size", "4x8").status == 0
    assert load_backbone(tmp_path / "out").shape.sample_size == (4, 8)
