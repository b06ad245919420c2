"""The data sets of this folder as a run's ``data`` section names them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from dydit.config import DataConfig
from dydit.errors import ConfigError
from dydit.latents.cache import CachedLatents
from dydit.latents.image_folder import FolderImages, scan_images

log = logging.getLogger(__name__)


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
    cache = CachedLatents(_path(config))
    if config.image_size not in (None, cache.settings.image_size):
        raise ConfigError(
            f"data.image_size is {config.image_size}",
            expected=f"{cache.settings.image_size}, the size that {cache.path} was encoded at",
            remedy="leave data.image_size empty",
        )
    return cache


def log_skipped(path: str | Path, problems: Sequence[str]) -> None:
    """Warn of everything that ``data.on_bad`` skip left out of a data set, and how much that is.

    Args:
        path: of the data set.
        problems: what was left out and why; names the file.
    """
    if problems:
        log.warning("%s: %d skipped (data.on_bad=skip), the first: %s", path, len(problems), problems[0])
    for problem in problems[1:]:
        log.warning("skipped: %s", problem)


def _path(config: DataConfig) -> Path:
    assert config.path is not None  # DataConfig refuses these names without it
    return Path(config.path)
