"""One autoencoder for the whole folder, and a cache made with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latent_builders import SIDE, image_folder, tiny_vae

from dydit.latents.autoencoder import Autoencoder, load_autoencoder
from dydit.latents.encode import EncodeResult, encode_folder
from dydit.latents.image_folder import scan_images
from dydit.latents.posteriors import EncodeConfig


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests kill processes but pull no plug, and waiting for the disk would take most of their time."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def autoencoder(vae_folder: Path) -> Autoencoder:
    return load_autoencoder(vae_folder, "cpu")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four cats and three dogs."""
    return image_folder(tmp_path / "images")


@pytest.fixture
def encode(autoencoder: Autoencoder, images: Path, tmp_path: Path) -> Callable[..., EncodeResult]:
    """``encode("cache", flip=True)``: the images into ``tmp_path / "cache"``, three per shard."""

    def run(name: str = "cache", **settings: Any) -> EncodeResult:
        config = EncodeConfig(**{"image_size": SIDE, "batch_size": 2, "shard_size": 3, **settings})
        folder = scan_images(images, config.on_bad)
        return encode_folder(folder, autoencoder, tmp_path / name, config)

    return run
