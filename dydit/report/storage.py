"""A summary on disk: ``summary.json`` and ``summary_arrays.safetensors``, each whole or not there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.numpy as tensors
from pydantic import ValidationError
from safetensors import SafetensorError

from dydit.errors import DataError
from dydit.files import write_file
from dydit.report.summary import Summary, SummaryArrays

SUMMARY_NAME = "summary.json"
ARRAYS_NAME = "summary_arrays.safetensors"
FORMAT_VERSION = 1


def write_summary(summary: Summary, folder: str | Path) -> Path:
    """Write both files into ``folder`` (made if needed) and return the path of the JSON.

    The JSON also lists derived figures (ratio, speed-up, …) for other readers; loading ignores them.

    Raises:
        OutputError: the folder cannot be written to.
    """
    arrays = tensors.save({name: _contiguous(array) for name, array in summary.arrays.present().items()})
    document = {
        "format_version": FORMAT_VERSION,
        "arrays_sha256": hashlib.sha256(arrays).hexdigest(),
        "summary": summary.model_dump(mode="json"),
        "derived": _derived(summary),
    }
    path = Path(folder) / SUMMARY_NAME
    write_file(Path(folder) / ARRAYS_NAME, arrays)
    write_file(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return path


def load_summary(folder: str | Path) -> Summary:
    """Read what ``write_summary`` wrote.

    Raises:
        DataError: a file is missing, damaged, of another format version, or the two do not belong together.
    """
    json_path, arrays_path = Path(folder) / SUMMARY_NAME, Path(folder) / ARRAYS_NAME
    document = _read_document(json_path)
    payload = _read(arrays_path)
    if hashlib.sha256(payload).hexdigest() != document.get("arrays_sha256"):
        raise DataError(
            f"{arrays_path} is not the file that {SUMMARY_NAME} was written with",
            remedy="run again what made them",
        )
    try:
        arrays = SummaryArrays(**tensors.load(payload))
        return Summary.model_validate({**document["summary"], "arrays": arrays})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "summary"
        raise DataError(f"{json_path}: {where}: {first['msg']}", remedy="run again what made it") from error
    except (SafetensorError, TypeError) as error:
        raise DataError(f"{arrays_path} cannot be read: {error}", remedy="run again what made it") from error


def _contiguous(array: Any) -> Any:
    return array if array.flags["C_CONTIGUOUS"] else array.copy(order="C")


def _derived(summary: Summary) -> dict[str, Any]:
    compute, time = summary.compute, summary.time
    return {
        "engine_mean_macs": compute.engine_mean_macs,
        "compute_ratio": compute.ratio,
        "ideal_speedup": compute.ideal_speedup,
        "static_median_ms": time.static_median_ms,
        "engine_median_ms": time.engine_median_ms,
        "speedup_quartiles": time.speedup_quartiles,
        "realised_share": summary.realised_share,
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}",
            expected=f"a folder with {SUMMARY_NAME} and {ARRAYS_NAME}",
            remedy="name the output folder of a finished run",
        ) from error


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_read(path))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not JSON: {error}", remedy="run again what made it") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION or not isinstance(document.get("summary"), dict):
        raise DataError(
            f"{path} has format version {version}",
            expected=f"version {FORMAT_VERSION}",
            remedy="run again with this version of dydit",
        )
    return document
