"""A schedule's two files: bit masks in safetensors, everything else in a manifest that vouches for both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as parse_tensors
from safetensors.numpy import save as serialize_tensors

import dydit
from dydit.errors import ScheduleError
from dydit.files import write_file

FORMAT_VERSION = 1
TENSORS, MANIFEST = "schedule.safetensors", "manifest.json"


def write_artefact(folder: str | Path, tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> None:
    """Write the two files into a folder, beside what is there.

    The manifest comes last and holds the sha256 of the tensors and of itself: a folder that was left in
    between is refused by ``read_artefact``.

    Raises:
        OutputError: the folder cannot be written.
    """
    data = serialize_tensors(dict(tensors))
    manifest = {
        "format_version": FORMAT_VERSION,
        "dydit_version": dydit.__version__,
        **fields,
        "schedule_sha256": hashlib.sha256(data).hexdigest(),
    }
    manifest["manifest_sha256"] = _manifest_sha256(manifest)
    write_file(Path(folder) / TENSORS, data)
    write_file(Path(folder) / MANIFEST, json.dumps(manifest, indent=1))


def is_artefact(folder: str | Path) -> bool:
    """Whether a folder is an export's, perhaps a damaged one. (Other folders have a manifest too.)"""
    return (Path(folder) / TENSORS).is_file()


def read_artefact(folder: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and manifest of a folder, unchanged since they were written together.

    Raises:
        ScheduleError: a file is missing, was changed, or is not of this format.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    data = _read(folder / TENSORS)
    if hashlib.sha256(data).hexdigest() != manifest["schedule_sha256"]:
        raise ScheduleError(
            f"{folder / TENSORS} is not the file its manifest was written with", remedy="export again"
        )
    return parse_tensors(data), manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    data = _read(path)
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise ScheduleError(f"{path} is not JSON ({error})", remedy="export again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ScheduleError(
            f"{path} has format version {version}",
            expected=str(FORMAT_VERSION),
            remedy="export again with this version of dydit",
        )
    if manifest.get("manifest_sha256") != _manifest_sha256(manifest):
        raise ScheduleError(f"{path} was changed after it was written", remedy="export again")
    return manifest


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Hex sha256 over every other field, whatever their order and spacing."""
    fields = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ScheduleError(
            f"{path} cannot be read ({error.strerror})", remedy="point to a folder that `dydit export` wrote"
        ) from error
