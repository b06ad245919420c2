"""A path or Hub id -> a file or folder on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dydit.errors import CheckpointError
from dydit.models.checkpoints.config_file import CONFIG
from dydit.models.checkpoints.sources import (
    WEIGHTS,
    SafetensorsFiles,
    TensorSource,
    first_line,
    index_files,
)
from dydit.models.checkpoints.torch_files import TorchFile

# Where a diffusers pipeline keeps its network.
PIPELINE_FOLDER = "transformer"

# What is fetched of a Hub repository, in its root or its pipeline's network; a pickle only for want of these.
_HUB_FILES = (
    CONFIG,
    f"{WEIGHTS}.safetensors",
    f"{WEIGHTS}-*.safetensors",
    f"{WEIGHTS}.safetensors.index.json",
)
_HUB_PICKLE = f"{WEIGHTS}.bin"


def locate(path: str | Path, revision: str | None = None) -> Path:
    """The weights file, or the folder with ``config.json``, that ``path`` means.

    Args:
        path: a file, a model's folder, a pipeline's folder, or a Hub id, which is downloaded.
        revision: branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: there is nothing, or it cannot be downloaded.
    """
    place = Path(path)
    if not os.path.exists(place):  # unlike Path.exists, False for what can be no path at all
        if _looks_local(path):
            raise CheckpointError(
                f"no model at {path}",
                expected="a weights file, or a folder with config.json and safetensors",
                remedy="check the path, or give a Hub id (owner/name)",
            )
        place = _download(str(path), revision)
    if place.is_dir() and not (place / CONFIG).is_file() and (place / PIPELINE_FOLDER).is_dir():
        return place / PIPELINE_FOLDER
    return place


def open_weights(place: Path) -> TensorSource:
    """The tensors of a weights file, or of a model's folder.

    Raises:
        CheckpointError: there are none, or they cannot be read.
    """
    try:
        if place.is_file():
            return SafetensorsFiles(str(place), [place]) if _is_safetensors(place) else TorchFile(place)
        for name, files in {
            f"{WEIGHTS}.safetensors.index.json": index_files,
            f"{WEIGHTS}.safetensors": lambda file: [file],
        }.items():
            if (place / name).is_file():
                return SafetensorsFiles(str(place), files(place / name))
        if (place / f"{WEIGHTS}.bin").is_file():  # folders from before diffusers wrote safetensors
            return TorchFile(place / f"{WEIGHTS}.bin")
    except OSError as error:
        raise CheckpointError(f"{place} cannot be read ({error.strerror or error})") from error
    raise CheckpointError(f"{place} holds no weights", expected=f"{WEIGHTS}.safetensors, whole or in shards")


def _is_safetensors(file: Path) -> bool:
    """Eight bytes of length, then a JSON mapping; or so named, so that a broken one is told as such."""
    with file.open("rb") as stream:
        return stream.read(9)[8:] == b"{" or file.suffix == ".safetensors"


def _looks_local(path: str | Path) -> bool:
    """Hub ids are ``owner/name``: neither absolute, nor dotted, nor deeper, nor with an existing parent."""
    text = str(path)
    return text.count("/") != 1 or text.startswith(("/", ".", "~")) or Path(text).parent.is_dir()


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(files: Sequence[str]) -> Path:
        patterns = [prefix + file for prefix in ("", f"{PIPELINE_FOLDER}/") for file in files]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))

    try:
        place = fetch(_HUB_FILES)
        # Not deeper: the snapshot's folder may hold another part of the pipeline by now, such as its VAE.
        whole = any(file for part in (place, place / PIPELINE_FOLDER) for file in part.glob("*.safetensors"))
        return place if whole else fetch([*_HUB_FILES, _HUB_PICKLE])
    except Exception as error:  # the Hub client raises its own, the network library's and the system's
        raise CheckpointError(
            f"{name} is no local path and cannot be fetched from the Hub ({first_line(error)})",
            remedy="check the name and the network",
        ) from error
