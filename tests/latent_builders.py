"""A tiny AutoencoderKL with random weights, and folders of small images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIDE = 16  # of the images that tests encode; latents are 4 × 8 × 8


def tiny_vae(seed: int = 0, **changes: Any) -> Any:
    """Two levels, so that it downsamples by 2."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            **{
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "block_out_channels": (8, 16),
                "norm_num_groups": 4,
                "latent_channels": 4,
                "sample_size": SIDE,
                **changes,
            }
        ).eval()


def save_image(path: Path, seed: int, size: tuple[int, int] = (20, 24), mode: str = "RGB") -> None:
    """An image of smooth colours; PNG, so that its bytes are read back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BILINEAR).convert(mode).save(path)


def image_folder(root: Path, cats: int = 4, dogs: int = 3) -> Path:
    """``cat/00.png`` …, ``dog/deep/00.png`` …"""
    for number in range(cats):
        save_image(root / "cat" / f"{number:02d}.png", number)
    for number in range(dogs):
        save_image(root / "dog" / "deep" / f"{number:02d}.png", 100 + number)
    return root
