"""The data sets of this folder as a run's ``data`` section names them."""

from __future__ import annotations

from pathlib import Path

from dydit.config import DataConfig
from dydit.errors import ConfigError
from dydit.latents.bad_data import log_skipped
from dydit.latents.cache import CachedLatents
from dydit.latents.image_folder import FolderImages, scan_images


def image_folder(config: DataConfig) -> FolderImages:
    """``data.name: image_folder``: pixels, one folder per class, at ``data.image_size``.

    Raises:
        ConfigError: the size is missing.
        DataError: as from ``scan_images``.
    """
    if config.image_size is None:
        raise ConfigError(
            "data.image_size is empty with data.name image_folder",
            expected="the side of the images in pixels",
            remedy="set it to the model's sample_size",
        )
    folder = scan_images(_path(config), config.on_bad)
    log_skipped(folder.root, [f"{folder.root / bad.name} {bad.reason}" for bad in folder.skipped])
    return FolderImages(folder, config.image_size)


def latents(config: DataConfig) -> CachedLatents:
    """``data.name: latents``: what ``dydit encode`` wrote.

    Raises:
        ConfigError: ``data.flip`` is set, or ``data.image_size`` is not the cache's.
        DataError: as from ``CachedLatents``.
    """
    if config.flip:
        raise ConfigError(
            "data.flip is true with data.name latents: a mirrored latent is not that of the mirrored image",
            remedy="encode with --flip, which is used without a setting, and set data.flip=false",
        )
    cache = CachedLatents(_path(config), on_bad=config.on_bad)
    if config.image_size not in (None, cache.settings.image_size):
        raise ConfigError(
            f"data.image_size is {config.image_size}",
            expected=f"{cache.settings.image_size}, the size that {cache.path} was encoded at",
            remedy="leave data.image_size empty",
        )
    return cache


def _path(config: DataConfig) -> Path:
    assert config.path is not None  # DataConfig refuses these names without it
    return Path(config.path)
