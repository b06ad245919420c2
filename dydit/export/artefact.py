"""A schedule on disk: bit masks in safetensors, everything else in a manifest, each checked on loading."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as parse_tensors
from safetensors.numpy import save as serialize_tensors

import dydit
from dydit.config import DyDiTConfig
from dydit.errors import ScheduleError
from dydit.export.schedule import SubnetSchedule
from dydit.files import write_folder
from dydit.shapes import ModelShape

FORMAT_VERSION = 1
TENSORS, MANIFEST = "schedule.safetensors", "manifest.json"


def save_schedule(schedule: SubnetSchedule, folder: str | Path) -> None:
    """Write the schedule's two files; the folder appears whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    tensors = serialize_tensors({
        "head_rows": np.packbits(schedule.head_rows, axis=-1),
        "group_rows": np.packbits(schedule.group_rows, axis=-1),
        "rows": schedule.rows,
    })  # fmt: skip
    manifest = {
        "format_version": FORMAT_VERSION,
        "dydit_version": dydit.__version__,
        **schedule.manifest,
        "schedule_sha256": hashlib.sha256(tensors).hexdigest(),
    }
    write_folder(folder, {TENSORS: tensors, MANIFEST: json.dumps(manifest, indent=1).encode()})


def load_schedule(folder: str | Path) -> SubnetSchedule:
    """Read a schedule and check it against its manifest.

    Raises:
        ScheduleError: a file is missing or broken, or the two do not belong together.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    data = _read(folder / TENSORS)
    if hashlib.sha256(data).hexdigest() != manifest.get("schedule_sha256"):
        raise ScheduleError(f"{folder / TENSORS} is not the file its manifest was written with",
                            remedy="export again")  # fmt: skip
    try:
        return _build(manifest, parse_tensors(data))
    except (KeyError, TypeError, ValueError) as error:
        raise ScheduleError(f"{folder / MANIFEST} is broken ({error!r})", remedy="export again") from error


def _build(manifest: dict[str, Any], tensors: dict[str, np.ndarray]) -> SubnetSchedule:
    shape = ModelShape(**{**manifest["shape"], "sample_size": tuple(manifest["shape"]["sample_size"])})
    schedule = SubnetSchedule(
        timesteps=tuple(manifest["timesteps"]),
        head_rows=np.unpackbits(tensors["head_rows"], axis=-1, count=shape.num_heads).astype(bool),
        group_rows=np.unpackbits(tensors["group_rows"], axis=-1, count=shape.mlp_groups).astype(bool),
        rows=tensors["rows"],
        shape=shape,
        routing=DyDiTConfig(**manifest["routing"]),
        weights=manifest["weights_sha256"],
        sampler=manifest["sampler"],
    )
    if schedule.rows.shape != (len(schedule.timesteps), shape.depth):
        raise ValueError(f"rows of shape {schedule.rows.shape}")
    if schedule.rows.min() < 0 or schedule.rows.max() >= len(schedule.head_rows):
        raise ValueError("a row index out of range")
    return schedule


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_read(path))
    except ValueError as error:
        if isinstance(error, ScheduleError):
            raise
        raise ScheduleError(f"{path} is not JSON ({error})", remedy="export again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ScheduleError(f"{path} has format version {version}", expected=str(FORMAT_VERSION),
                            remedy="export again with this version of dydit")  # fmt: skip
    return manifest


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ScheduleError(f"{path} cannot be read ({error.strerror})",
                            remedy="point to a folder that `dydit export` wrote") from error  # fmt: skip
