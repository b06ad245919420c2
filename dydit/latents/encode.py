"""A folder of images -> a folder of latents: shard by shard, so that a run that was killed can go on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dydit.errors import DataError, OutputError
from dydit.files import check_writable
from dydit.latents.autoencoder import Autoencoder
from dydit.latents.image_folder import ImageFolder, Skipped, load_image
from dydit.latents.manifest import (
    MANIFEST,
    CacheSettings,
    Manifest,
    ShardEntry,
    VaeFacts,
    read_manifest,
    source_sha256,
    write_manifest,
)
from dydit.latents.posteriors import EncodeConfig, encode_images
from dydit.latents.shards import check_bytes, check_header, write_shard


@dataclass(frozen=True)
class EncodeResult:
    """What became of a folder of images.

    Args:
        manifest: of the finished cache.
        kept: shards that were there before and were found intact.
    """

    manifest: Manifest
    kept: int


def encode_folder(
    folder: ImageFolder, autoencoder: Autoencoder, out: str | Path, config: EncodeConfig
) -> EncodeResult:
    """Cache the latents of all images of a folder; what an earlier run finished is checked and kept.

    Shard k holds the posteriors of images k·shard_size … in order of name. It is kept when its file has the
    checksum that the manifest gives, and its images have the names, labels and sizes they had. The others are
    encoded, batches beginning anew with each shard: so a run that was killed and continued writes the same
    bytes as one that was not.

    Args:
        folder: from ``scan_images``.
        autoencoder: from ``load_autoencoder``.
        out: folder of the cache: new, empty, or a cache with the same settings.
        config: batch size, workers and ``on_bad`` may change between runs.

    Raises:
        ShapeError: the autoencoder cannot take images of that size.
        DataError: an image is bad and ``on_bad`` is raise, or no image is good. Finished shards stay.
        OutputError: ``out`` cannot be written, lies in the image folder, or holds something else.
    """
    out = Path(out)
    settings = cache_settings(autoencoder, config)
    if out.resolve().is_relative_to(folder.root.resolve()):
        raise OutputError(f"{out} lies in the folder of the images", remedy="choose another --out")
    job = _Job(folder, autoencoder, out, settings, config)
    job.open()
    kept = len(job.entries)
    job.run()
    return EncodeResult(job.close(), kept)


def cache_settings(autoencoder: Autoencoder, config: EncodeConfig) -> CacheSettings:
    """What the manifest says about the latents of this autoencoder.

    Raises:
        ShapeError: the autoencoder cannot take images of that size.
    """
    return CacheSettings(
        vae=VaeFacts(
            name=autoencoder.name,
            sha256=autoencoder.sha256,
            scaling_factor=autoencoder.scaling_factor,
            shift=autoencoder.shift,
        ),
        image_size=config.image_size,
        latent_shape=autoencoder.latent_shape(config.image_size),
        dtype=config.dtype,
        flip=config.flip,
        shard_size=config.shard_size,
    )


class _Job:
    """One run: the parts of the image folder, and the entries of those that are finished."""

    def __init__(
        self, folder: ImageFolder, autoencoder: Autoencoder, out: Path,
        settings: CacheSettings, config: EncodeConfig,
    ) -> None:  # fmt: skip
        self.folder, self.autoencoder, self.out = folder, autoencoder, out
        self.settings, self.config = settings, config
        size = config.shard_size
        self.parts = [folder.files[i : i + size] for i in range(0, len(folder.files), size)]
        self.sources = [source_sha256(folder.root, part) for part in self.parts]
        self.entries: dict[int, ShardEntry] = {}
        self.written: Manifest | None = None

    def open(self) -> None:
        """Prepare the output folder, and take over what is there and intact.

        Raises:
            OutputError: the folder holds something else, or a cache with other settings.
            DataError: a finished shard has left out images, and ``on_bad`` is raise.
        """
        check_writable(self.out)
        for pattern in (".shard-*.safetensors.*", f".{MANIFEST}.*"):  # what a killed run was writing
            for path in self.out.glob(pattern):
                path.unlink(missing_ok=True)
        if any(self.out.iterdir()):
            self.written = self._manifest_before()
            for entry in tqdm(
                self._reusable(self.written), "checking", unit="shard", leave=False, disable=None
            ):
                if self._is_intact(entry):
                    self.entries[entry.index] = entry
        else:
            self._write(complete=False)

    def run(self) -> None:
        """Encode the parts that are missing, and write the manifest after each.

        Raises:
            DataError: an image is bad, and ``on_bad`` is raise.
        """
        with tqdm(total=len(self.folder.files), desc="encoding", unit="image", disable=None) as bar:
            for index, part in enumerate(self.parts):
                if index in self.entries:
                    bar.update(len(part))
                    continue
                shard = encode_images(self.folder.root, part, self.autoencoder, self.config, bar.update)
                self.entries[index] = write_shard(self.out, index, *shard, self.sources[index])
                self._write(complete=False)

    def close(self) -> Manifest:
        """Declare the cache complete, and delete shards that no image belongs to any more.

        Raises:
            DataError: not one image could be used.
        """
        manifest = self._manifest(complete=True)
        if not manifest.images:
            first = manifest.all_skipped[0]
            raise DataError(
                f"none of the {len(self.folder.files)} images can be used: {first.name} {first.reason}"
            )
        if manifest != self.written:
            write_manifest(self.out, manifest)
        names = {entry.name for entry in manifest.shards}
        for path in self.out.glob("shard-*.safetensors"):
            if path.name not in names:
                path.unlink(missing_ok=True)
        return manifest

    def _manifest_before(self) -> Manifest:
        """The manifest of the cache that is there.

        Raises:
            OutputError: there is none, or it has other settings.
        """
        if not (self.out / MANIFEST).is_file():
            raise OutputError(
                f"{self.out} holds other files",
                expected="a new folder or a cache",
                remedy="choose another --out",
            )
        before = read_manifest(self.out)
        known = _flat(before.settings)
        for key, wanted in _flat(self.settings).items():
            if known[key] != wanted and key != "vae.name":  # the same weights may have moved
                raise OutputError(
                    f"{self.out} holds a cache with {key}={known[key]}",
                    expected=f"{key}={wanted}, as asked for",
                    remedy="choose another --out",
                )
        return before

    def _reusable(self, before: Manifest) -> list[ShardEntry]:
        """Entries whose images are what they were."""
        return [
            entry
            for entry in before.shards
            if entry.index < len(self.parts) and entry.source == self.sources[entry.index]
        ]

    def _is_intact(self, entry: ShardEntry) -> bool:
        if any(map(self._is_repaired, entry.skipped)):
            return False
        if entry.skipped and self.config.on_bad == "raise":
            first = entry.skipped[0]
            raise DataError(
                f"{entry.name} was made without {first.name}, which {first.reason}",
                remedy="repair or remove it, or set on_bad to skip",
            )
        try:
            check_bytes(self.out, entry)
            check_header(self.out, entry, self.settings)
        except DataError as damage:
            tqdm.write(f"{damage.args[0].split('; ')[0]}: encoding it again", file=sys.stderr)
            return False
        return True

    def _is_repaired(self, image: Skipped) -> bool:
        """Whether an image can be read that could not; its size, which the source knows, may be as before."""
        if not image.reason.startswith("cannot be read"):
            return False
        try:
            load_image(self.folder.root / image.name, self.config.image_size)
        except DataError:
            return False
        return True

    def _write(self, complete: bool) -> None:
        self.written = self._manifest(complete)
        write_manifest(self.out, self.written)

    def _manifest(self, complete: bool) -> Manifest:
        return Manifest(
            complete=complete,
            settings=self.settings,
            classes=self.folder.classes,
            shards=[entry for _, entry in sorted(self.entries.items())],
            skipped=list(self.folder.skipped),
            ignored=self.folder.ignored,
        )


def _flat(settings: CacheSettings) -> dict[str, object]:
    fields = settings.model_dump()
    return {**{f"vae.{key}": value for key, value in fields.pop("vae").items()}, **fields}
