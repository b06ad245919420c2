"""Image files -> the tensors of one shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dydit.config import Section
from dydit.errors import DataError
from dydit.latents.autoencoder import Autoencoder
from dydit.latents.image_folder import ImageFile, Skipped, load_image, to_signed
from dydit.latents.manifest import LatentDtype
from dydit.latents.shards import DTYPES, LABELS, MIRRORED, PLAIN, tensor_names


class EncodeConfig(Section):
    """How images become cached latents."""

    image_size: int = Field(default=256, ge=1, description="side of the images in pixels")
    batch_size: int = Field(default=16, ge=1, description="images per call of the autoencoder")
    shard_size: int = Field(default=4096, ge=1, description="images per file of the cache")
    flip: bool = Field(default=False, description="encode the mirrored images as well")
    dtype: LatentDtype = Field(default="float16", description="number format of means and deviations")
    on_bad: Literal["raise", "skip"] = Field(default="raise", description="what to do about a bad image")
    num_workers: int = Field(default=0, ge=0, description="processes that read images; 0: this one")


class Encoded(NamedTuple):
    """A shard's content: ``labels`` (n,), posteriors (n, C, h, w), the n images, and those left out."""

    tensors: dict[str, Tensor]
    files: list[str]
    skipped: list[Skipped]


class _Sample(NamedTuple):
    """An image as bytes (3, size, size); where ``problem`` says why there is none, black."""

    file: ImageFile
    pixels: Tensor
    problem: str = ""


def encode_images(
    root: Path, files: Sequence[ImageFile], autoencoder: Autoencoder, config: EncodeConfig,
    progress: Callable[[int], object],
) -> Encoded:  # fmt: skip
    """Encode images in batches; in memory are one batch of pixels and the latents so far.

    Args:
        root: the image folder.
        files: images of it.
        autoencoder: on its device.
        config: all but ``shard_size`` counts here.
        progress: called with the number of images that were dealt with.

    Raises:
        DataError: an image cannot be used, and ``on_bad`` is raise; names it.
    """
    shape = (0, *autoencoder.latent_shape(config.image_size))
    rows = [dict.fromkeys(tensor_names(config.flip), torch.empty(shape, dtype=DTYPES[config.dtype]))]
    names: list[str] = []
    labels: list[int] = []
    skipped: list[Skipped] = []
    for batch in _read(root, files, config):
        tensors = _posteriors(autoencoder, torch.stack([sample.pixels for sample in batch]), config)
        batch = _without_overflow(batch, tensors, config.dtype)
        bad = [Skipped(sample.file.name, sample.problem) for sample in batch if sample.problem]
        if bad and config.on_bad == "raise":
            raise DataError(
                f"{root / bad[0].name} {bad[0].reason}", remedy="repair or remove it, or set on_bad to skip"
            )
        good = torch.tensor([not sample.problem for sample in batch])
        rows.append({name: tensor[good] for name, tensor in tensors.items()})
        names += [sample.file.name for sample in batch if not sample.problem]
        labels += [sample.file.label for sample in batch if not sample.problem]
        skipped += bad
        progress(len(batch))
    latents = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return Encoded({LABELS: torch.tensor(labels, dtype=torch.int64), **latents}, names, skipped)


class _Samples(Dataset):
    """Images read one by one; a problem is part of the item, so that it crosses from a loader process."""

    def __init__(self, root: Path, files: Sequence[ImageFile], size: int) -> None:
        self.root, self.files, self.size = root, files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> _Sample:
        file = self.files[index]
        path = self.root / file.name
        try:
            return _Sample(file, load_image(path, self.size))
        except DataError as problem:
            black = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            return _Sample(file, black, str(problem).removeprefix(f"{path} "))


def _read(root: Path, files: Sequence[ImageFile], config: EncodeConfig) -> Iterator[list[_Sample]]:
    yield from DataLoader(
        _Samples(root, files, config.image_size),
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # or the loader would draw from the global one
    )


def _posteriors(autoencoder: Autoencoder, pixels: Tensor, config: EncodeConfig) -> dict[str, Tensor]:
    """Means and deviations (B, C, h, w) of images (B, 3, size, size) in bytes, as stored, on the CPU."""
    images = to_signed(pixels.to(autoencoder.network.device))
    views = {PLAIN: images, MIRRORED: images.flip(-1)} if config.flip else {PLAIN: images}
    # Equal images give equal bytes, and a cache outlives the run: no choice of kernels by timing, no TF32.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        found = {names: autoencoder.posterior(view) for names, view in views.items()}
    return {
        name: tensor.to(DTYPES[config.dtype]).cpu()
        for names, posterior in found.items()
        for name, tensor in zip(names, posterior, strict=True)
    }


def _without_overflow(batch: list[_Sample], tensors: dict[str, Tensor], dtype: str) -> list[_Sample]:
    """The batch, samples marked whose latent is not finite in the stored format."""
    finite = torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in tensors.values()]).all(0)
    problem = f"has a latent that is not finite in {dtype}"
    return [
        sample if fine else sample._replace(problem=sample.problem or problem)
        for sample, fine in zip(batch, finite.tolist(), strict=True)
    ]
