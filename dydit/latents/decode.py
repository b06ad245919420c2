"""Latents -> images, and images -> one picture to look at."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from dydit.errors import DataError

if TYPE_CHECKING:  # diffusers' autoencoders take seconds to import, and a grid needs none
    from dydit.latents.autoencoder import Autoencoder


def decode_latents(autoencoder: Autoencoder, latents: Tensor, batch_size: int = 8) -> Tensor:
    """Images (n, 3, height, width) float32 on the CPU, nominally in [−1, 1], of scaled latents (n, C, h, w).

    Args:
        batch_size: latents per call: decoding takes far more memory than drawing them.

    Raises:
        ShapeError: the latents have another number of channels than the autoencoder.
        DataError: an image is not finite.
    """
    images = []
    with tqdm(total=len(latents), desc="decoding", unit="image", disable=None) as bar:
        for part in latents.split(batch_size):
            images.append(autoencoder.decode(part).float().cpu())
            bar.update(len(part))
    decoded = torch.cat(images)
    if broken := int((~decoded.isfinite()).flatten(1).any(1).sum()):
        raise DataError(
            f"{broken} of {len(decoded)} decoded images are not finite", remedy="check the latents"
        )
    return decoded


def png_grid(images: Tensor, columns: int, min_side: int = 64) -> bytes:
    """A PNG of images (n, C, height, width) in rows; [−1, 1] is black to white, and the rest is cut off.

    Args:
        images: of 1 or 3 channels; of others, such as latents, the first three are shown (of two the first).
        columns: images per row.
        min_side: small images are enlarged to about this many pixels.
    """
    picture = io.BytesIO()
    shown = images if images.shape[1] in (1, 3) else images[:, : 1 if images.shape[1] == 2 else 3]
    enlarge = max(1, round(min_side / images.shape[-1]))
    shown = shown.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    save_image(shown, picture, format="png", nrow=columns, normalize=True, value_range=(-1, 1))
    return picture.getvalue()
