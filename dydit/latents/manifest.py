"""What a cache of latents says about itself: the manifest beside its shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import dydit
from dydit.errors import DataError
from dydit.files import write_file
from dydit.latents.image_folder import ImageFile, Skipped

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

LatentDtype = Literal["float16", "bfloat16", "float32"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardEntry(_Record):
    """One shard: row i of its tensors is ``files[i]``.

    Args:
        name: the shard's file.
        bytes: its size.
        sha256: of the file.
        source: sha256 over names, labels and sizes of the images it was made from, skipped ones included.
        files: images in it, by their path below the image folder.
        skipped: images that could not be used.
    """

    name: str = Field(pattern=r"^shard-\d{5,}\.safetensors$")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    source: str = Field(pattern=r"^[0-9a-f]{64}$")
    files: list[str]
    skipped: list[Skipped]

    @property
    def index(self) -> int:
        """Number of the shard."""
        return int(self.name.removeprefix("shard-").removesuffix(".safetensors"))


class VaeFacts(_Record):
    """The autoencoder: path or Hub id, sha256 of its weights, and x = (z − shift) · scaling_factor."""

    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scaling_factor: float = Field(gt=0)
    shift: float


class CacheSettings(_Record):
    """What every latent of a cache has in common; a cache goes on only with the same.

    Args:
        vae: the autoencoder.
        image_size: side of the images in pixels.
        latent_shape: (C, h, w).
        dtype: of the stored means and deviations.
        flip: whether the mirrored images are in it too.
        shard_size: images per shard, skipped ones included.
    """

    vae: VaeFacts
    image_size: int = Field(ge=1)
    latent_shape: tuple[int, int, int]
    dtype: LatentDtype
    flip: bool
    shard_size: int = Field(ge=1)


class Manifest(_Record):
    """Everything about a cache but the numbers.

    Args:
        format_version: of folder and shards.
        dydit_version: that wrote it.
        complete: whether every image has been dealt with.
        settings: of the encoding.
        classes: class folder -> label.
        shards: in the order of the images.
        skipped: class folders without images, and images outside of a class.
        ignored: files that are no images by their ending.
    """

    format_version: int = FORMAT_VERSION
    dydit_version: str = dydit.__version__
    complete: bool
    settings: CacheSettings
    classes: dict[str, int] = Field(min_length=1)
    shards: list[ShardEntry]
    skipped: list[Skipped]
    ignored: int = Field(ge=0)

    @property
    def images(self) -> int:
        """Images in the cache."""
        return sum(len(shard.files) for shard in self.shards)

    @property
    def all_skipped(self) -> list[Skipped]:
        """Everything that was left out."""
        return [*self.skipped, *(file for shard in self.shards for file in shard.skipped)]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest in place of the one before.

    Raises:
        OutputError: the folder cannot be written.
    """
    # Through json: a file name that is no UTF-8 comes from the system as lone surrogates, which it escapes.
    write_file(folder / MANIFEST, json.dumps(manifest.model_dump(), indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache, checked field by field.

    Raises:
        DataError: it is missing, broken, or of another format.
    """
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise DataError(
            f"{path} cannot be read ({problem.strerror})",
            expected="a folder that `dydit encode` wrote",
            remedy="check the path",
        ) from problem
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path} is not JSON ({problem})", remedy="encode into another folder") from problem
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version!r}",
            expected=str(FORMAT_VERSION),
            remedy="encode again with this version of dydit",
        )
    try:
        return Manifest(**fields)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {key}: {first['msg']}", remedy="encode into another folder") from problem


def source_sha256(root: Path, files: Sequence[ImageFile]) -> str:
    """Hex sha256 over name, label and size in bytes of images; a file that is gone counts with size −1."""
    digest = hashlib.sha256()
    for file in files:
        try:
            size = (root / file.name).stat().st_size
        except OSError:
            size = -1
        digest.update(json.dumps([file.name, file.label, size]).encode())
    return digest.hexdigest()
