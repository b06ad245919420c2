"""``dydit encode`` from images to a training run, and ``dydit sample --vae``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from latent_builders import SIDE, image_folder, tiny_vae
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import dydit
from dydit.latents.autoencoder import load_autoencoder
from dydit.latents.decode import decode_latents, png_grid

TINY: Any = {
    "sample_size": 8, "patch_size": 4, "in_channels": 4, "hidden_size": 16, "depth": 1, "num_heads": 2,
    "num_classes": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def words(vae: Path, tmp_path: Path) -> tuple[Any, ...]:
    images = image_folder(tmp_path / "images")
    return (
        "encode",
        images,
        "--vae",
        vae,
        "--out",
        tmp_path / "cache",
        "--image-size",
        SIDE,
        "--shard-size",
        4,
    )


def test_encode_then_train(command: Any, words: Any, tmp_path: Path) -> None:
    outcome = command(*words, "--flip", "--dtype", "bfloat16", "--batch-size", 3)
    assert outcome.status == 0, outcome.err
    told = "latents of 7 images and of their mirror images, 4 × 8 × 8, bfloat16, in 2 shards (0 kept"
    assert told in outcome.out
    assert "(2 kept from before)" in command(*words, "--flip", "--dtype", "bfloat16").out
    (tmp_path / "run.yaml").write_text(
        f"""\
task: pretrain
output_dir: {tmp_path / "run"}
model: {json.dumps(TINY)}
data: {{name: latents, path: {tmp_path / "cache"}, batch_size: 4}}
train: {{steps: 2, save_every: 2, log_every: 1}}
"""
    )
    outcome = command("pretrain", tmp_path / "run.yaml")
    assert outcome.status == 0, outcome.err


def test_bad_images(command: Any, words: Any, tmp_path: Path) -> None:
    (tmp_path / "images" / "cat" / "02.png").write_text("no image")
    (tmp_path / "images" / "cat" / "notes.txt").write_text("nice cats")
    told = command(*words).error
    assert "cat/02.png cannot be read (cannot identify image file)" in told
    outcome = command(*words, "--on-bad", "skip")
    assert outcome.status == 0, outcome.err
    assert (
        "latents of 6 images" in outcome.out
        and "1 left out" in outcome.out
        and "1 files ignored" in outcome.out
    )
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["shards"][0]["skipped"] == [
        {"name": "cat/02.png", "reason": "cannot be read (cannot identify image file)"}
    ]


def test_mistakes_take_one_line(command: Any, words: Any, vae: Path, tmp_path: Path, blocked: Path) -> None:
    verb, images, _, _, _, out, *rest = words
    assert "is no folder" in command(verb, tmp_path / "nowhere", "--vae", vae, "--out", out).error
    assert "no autoencoder at ./vae" in command(verb, images, "--vae", "./vae", "--out", out).error
    assert str(blocked) in command(verb, images, "--vae", vae, "--out", blocked, *rest).error
    assert "--dtype" in command(*words, "--dtype", "int8").error
    assert "multiple of 2" in command(*words[:-3], 15).error
    assert not out.exists()
    (vae / "diffusion_pytorch_model.safetensors").rename(tmp_path / "w")
    try:
        assert "cannot be loaded" in command(*words).error
    finally:
        (tmp_path / "w").rename(vae / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent_model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dydit.DiT(**TINY).save_pretrained(folder)
    return folder


def test_sample_decodes_latents(command: Any, latent_model: Path, vae: Path, tmp_path: Path) -> None:
    words = ("sample", latent_model, "--labels", "0,1", "--steps", 2, "--out", tmp_path)
    outcome = command(*words, "--vae", vae)
    assert outcome.status == 0, outcome.err
    latents = load_file(tmp_path / "samples.safetensors")["images"]
    assert latents.shape == (2, 4, 8, 8)
    decoded = decode_latents(load_autoencoder(vae, "cpu"), latents)
    assert (tmp_path / "samples.png").read_bytes() == png_grid(decoded, columns=2)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (2 * 66 + 2, 64 + 4)
    with safe_open(tmp_path / "samples.safetensors", "pt") as file:
        assert json.loads(file.metadata()["dydit"])["vae"] == str(vae)


def test_an_autoencoder_of_other_latents(command: Any, models: Any, vae: Path, tmp_path: Path) -> None:
    words = ("sample", models.static, "--labels", "0", "--out", tmp_path / "s", "--vae", vae)
    assert "latents of 4 channels; expected 1, as the model draws" in command(*words).error
    assert not (tmp_path / "s").exists()
