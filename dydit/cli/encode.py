"""``dydit encode``: the latents of an image folder, cached for training."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(str, Enum):
    """Number formats of a cache."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class OnBad(str, Enum):
    """What to do about an image that cannot be used."""

    RAISE = "raise"
    SKIP = "skip"


def encode(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="Folder with one folder of images per class.")
    ],
    vae: Annotated[
        str, typer.Option(metavar="PATH|ID", help="AutoencoderKL, such as stabilityai/sd-vae-ft-mse.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the cache; one that was begun there is continued.")],
    image_size: Annotated[int, typer.Option(min=1, help="Side of the images in pixels.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call of the autoencoder.")] = 16,
    shard_size: Annotated[int, typer.Option(min=1, help="Images per file of the cache.")] = 4096,
    flip: Annotated[bool, typer.Option("--flip", help="Encode the mirrored images as well.")] = False,
    on_bad: Annotated[
        OnBad, typer.Option(help="Stop at a bad image, or leave it out and list it in the manifest.")
    ] = OnBad.RAISE,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the cache.")] = Dtype.float16,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read images; 0: this one.")] = 0,
) -> None:
    """Cache the latents of an image folder."""
    from dydit.latents.autoencoder import load_autoencoder
    from dydit.latents.encode import encode_folder
    from dydit.latents.image_folder import scan_images
    from dydit.latents.posteriors import EncodeConfig

    config = EncodeConfig(
        image_size=image_size,
        batch_size=batch_size,
        shard_size=shard_size,
        flip=flip,
        dtype=dtype.value,
        on_bad=on_bad.value,
        num_workers=num_workers,
    )
    folder = scan_images(images, config.on_bad)  # a wrong folder is told before a download
    result = encode_folder(folder, load_autoencoder(vae), out, config)
    manifest, shards = result.manifest, len(result.manifest.shards)
    channels, height, width = manifest.settings.latent_shape
    twins = " and of their mirror images" if flip else ""
    typer.echo(
        f"{out}: latents of {manifest.images} images{twins}, {channels} × {height} × {width}, {dtype.value}, "
        f"in {shards} shards ({result.kept} kept from before)"
    )
    if skipped := manifest.all_skipped:
        first = f"{skipped[0].name} {skipped[0].reason}"
        typer.echo(f"{len(skipped)} left out, listed in {out / 'manifest.json'}: {first}")
    if manifest.ignored:
        typer.echo(f"{manifest.ignored} files ignored: no images by their ending")
