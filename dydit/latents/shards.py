"""One file of cached latents: its tensors, its checks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize_tensors
from torch import Tensor

from dydit.errors import DataError
from dydit.files import sha256_of, write_file
from dydit.latents.image_folder import Skipped
from dydit.latents.manifest import CacheSettings, ShardEntry

LABELS = "labels"
# A posterior's two tensors, of the image and of its mirror image.
PLAIN, MIRRORED = ("mean", "std"), ("mean_mirrored", "std_mirrored")

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # safetensors' names

# What safetensors raises over a file that is damaged, or gone.
READ_ERRORS = (SafetensorError, OSError, ValueError, TypeError, RuntimeError, IndexError)


def tensor_names(flip: bool) -> tuple[str, ...]:
    """The tensors of a shard beside its labels."""
    return PLAIN + MIRRORED if flip else PLAIN


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.safetensors"


def write_shard(
    folder: Path, index: int, tensors: Mapping[str, Tensor],
    files: Sequence[str], skipped: Sequence[Skipped], source: str,
) -> ShardEntry:  # fmt: skip
    """Write a shard, whole or not at all, and return its entry for the manifest.

    Args:
        folder: the cache.
        index: number of the shard.
        tensors: ``labels`` (n,) int64 and those of ``tensor_names``, each (n, C, h, w).
        files: the n images. skipped: those that were left out. source: ``source_sha256`` of both.

    Raises:
        OutputError: the folder cannot be written.
    """
    data = serialize_tensors(dict(tensors))
    write_file(folder / shard_name(index), data)
    return ShardEntry(
        name=shard_name(index),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        source=source,
        files=list(files),
        skipped=list(skipped),
    )


def check_bytes(folder: Path, entry: ShardEntry) -> None:
    """Make sure that a shard is the file its manifest was written with.

    Raises:
        DataError: it is missing, shorter, longer or altered; names it.
    """
    path = folder / entry.name
    try:
        size = path.stat().st_size
        sha256 = sha256_of(path) if size == entry.bytes else None
    except OSError as problem:
        raise _damaged(path, f"cannot be read ({problem.strerror})") from problem
    if size != entry.bytes:
        raise _damaged(path, f"has {size} bytes", f"{entry.bytes}, as its manifest says")
    if sha256 != entry.sha256:
        raise _damaged(path, "is not the file its manifest was written with")


def check_header(folder: Path, entry: ShardEntry, settings: CacheSettings) -> None:
    """Make sure that a shard holds the tensors, shapes and dtypes that its manifest promises.

    Raises:
        DataError: it is no safetensors file, or one tensor is not as promised; names it.
    """
    path, rows = folder / entry.name, len(entry.files)
    wanted: dict[str, tuple[list[int], str]] = {LABELS: ([rows], "I64")}
    for name in tensor_names(settings.flip):
        wanted[name] = [rows, *settings.latent_shape], _STORED[settings.dtype]
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            found = {name: (s.get_shape(), s.get_dtype()) for name, s in slices.items()}
    except READ_ERRORS as problem:
        raise _damaged(path, f"cannot be read ({problem})") from problem
    for name in sorted({*wanted, *found}):
        if found.get(name) != wanted.get(name):
            raise _damaged(path, f"has {_tensor(name, found)}", _tensor(name, wanted))


def read_labels(folder: Path, entry: ShardEntry) -> Tensor:
    """Labels (n,) int64 of a shard.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with safe_open(folder / entry.name, framework="pt") as file:
            return file.get_tensor(LABELS).clone()
    except READ_ERRORS as problem:
        raise _damaged(folder / entry.name, f"cannot be read ({problem})") from problem


def _tensor(name: str, tensors: Mapping[str, tuple[list[int], str]]) -> str:
    if name not in tensors:
        return f"no tensor {name}"
    shape, dtype = tensors[name]
    return f"{name} of shape {tuple(shape)} and type {dtype}"


def _damaged(path: Path, seen: str, expected: str = "") -> DataError:
    return DataError(
        f"{path} {seen}",
        expected=expected,
        remedy="run the same `dydit encode` again: it replaces damaged shards",
    )
