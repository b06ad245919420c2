"""Drawing samples with a progress bar, and writing them as a picture and as tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize_tensors
from torch import Tensor
from tqdm import tqdm

from dydit.diffusion import Sampler
from dydit.errors import DataError
from dydit.files import write_file
from dydit.latents.decode import png_grid

_IMAGES_PER_BATCH = 64
# Small images are enlarged to about this side, so that a grid of 8 × 8 digits can be looked at.
_SHOWN_SIDE_PIXELS = 64


def draw_images(sampler: Sampler, network: Any, labels: Sequence[int], seed: int) -> Tensor:
    """One sample per label (n, C, height, width), on the CPU.

    Args:
        network: a model or an engine, on the device to draw on.
        seed: of the noise, which is drawn on the CPU: every device starts from the same.

    Raises:
        DataError: a sample is not finite.
    """
    parameter = next(network.parameters())
    generator = torch.Generator().manual_seed(seed)
    channels, (height, width) = network.shape.in_channels, network.shape.sample_size
    drawn = []
    batches = [labels[i : i + _IMAGES_PER_BATCH] for i in range(0, len(labels), _IMAGES_PER_BATCH)]
    with tqdm(total=len(batches) * len(sampler.timesteps), desc="sampling", unit="step") as bar:
        for batch in batches:
            x = torch.randn(len(batch), channels, height, width, generator=generator).to(parameter)
            y = torch.tensor(batch, device=parameter.device)
            sample = x
            for _, sample in sampler.trajectory(network, x, y, network.null_label, generator):  # noqa: B007
                bar.update()
            drawn.append(sample.float().cpu())
    images = torch.cat(drawn)
    if broken := int((~images.isfinite()).flatten(1).any(1).sum()):
        raise DataError(
            f"{broken} of {len(images)} samples are not finite", remedy="check the weights and the guidance"
        )
    return images


def write_images(
    folder: Path, images: Tensor, labels: Sequence[int], columns: int, facts: Mapping[str, Any],
    decoded: Tensor | None = None,
) -> None:  # fmt: skip
    """Write ``samples.safetensors`` (images, labels, ``facts`` as JSON metadata) and ``samples.png``.

    The picture shows [−1, 1] as black to white; of latents it shows the first three channels.

    Args:
        images: what the model drew (n, C, height, width). labels: n classes. columns: images per row of
            the picture.
        decoded: the images (n, 3, height, width) to show in place of latents.

    Raises:
        OutputError: the folder cannot be written.
    """
    tensors = {"images": images.contiguous(), "labels": torch.tensor(labels)}
    # One entry: safetensors writes several in random order, and equal runs should write equal files.
    metadata = {"dydit": json.dumps(facts, sort_keys=True)}
    picture = png_grid(images if decoded is None else decoded, columns, _SHOWN_SIDE_PIXELS)
    write_file(folder / "samples.safetensors", serialize_tensors(tensors, metadata))
    write_file(folder / "samples.png", picture)
