"""The autoencoder between images and latents: diffusers' AutoencoderKL, and the scale of its latents."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor

from dydit.errors import CheckpointError, ShapeError
from dydit.export.fingerprint import weights_sha256

CONFIG = "config.json"
PIPELINE_FOLDER = "vae"  # where a diffusers pipeline keeps it
IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class Autoencoder:
    """A loaded AutoencoderKL, in evaluation mode.

    A diffusion model's latents are ``(z - shift) · scaling_factor`` of the autoencoder's own z: about unit
    variance (Rombach et al., Latent Diffusion, D.1).

    Args:
        network: the module.
        name: path or Hub id that it was loaded from.
        sha256: of its weights.
        scaling_factor: 0.18215 for ``stabilityai/sd-vae-ft-*``.
        shift: 0 for them.
    """

    network: Any
    name: str
    sha256: str
    scaling_factor: float
    shift: float = 0.0

    @property
    def channels(self) -> int:
        """Channels C of a latent."""
        return int(self.network.config.latent_channels)

    @property
    def downsampling(self) -> int:
        """Pixels of the image along one side of a latent pixel."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latent of a square image.

        Raises:
            ShapeError: the side is no multiple of the downsampling.
        """
        factor = self.downsampling
        if image_size % factor:
            raise ShapeError(
                f"images of {image_size} × {image_size} with an autoencoder that downsamples by {factor}",
                expected=f"a multiple of {factor}",
                remedy=f"use {max(1, round(image_size / factor)) * factor}",
            )
        return self.channels, image_size // factor, image_size // factor

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of z, each (B, C, h, w), unscaled.

        Args:
            images: (B, 3, height, width) in [−1, 1], on any device.
        """
        distribution = self.network.encode(images.to(self.network.device, self.network.dtype)).latent_dist
        return distribution.mean, distribution.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, height, width), nominally in [−1, 1], of scaled latents (B, C, h, w).

        Raises:
            ShapeError: the latents have another number of channels.
        """
        if latents.shape[1] != self.channels:
            raise ShapeError(
                f"latents of {latents.shape[1]} channels", expected=f"the autoencoder's {self.channels}"
            )
        z = latents.to(self.network.device, self.network.dtype) / self.scaling_factor + self.shift
        return self.network.decode(z).sample


def load_autoencoder(path_or_id: str | Path, device: str | torch.device | None = None) -> Autoencoder:
    """Load an AutoencoderKL in float32.

    Args:
        path_or_id: its folder, the folder of a pipeline that has one, or a Hub id of either, such as
            ``stabilityai/sd-vae-ft-mse``, which is downloaded.
        device: where to put it; None: the GPU if there is one.

    Raises:
        CheckpointError: there is none, it is of another kind, or a tensor is missing, left over, of another
            shape or not finite.
    """
    name = str(path_or_id)
    network = _load(name)
    config = network.config
    if config.in_channels != IMAGE_CHANNELS or config.out_channels != IMAGE_CHANNELS:
        raise CheckpointError(
            f"autoencoder {name} has {config.in_channels} input and {config.out_channels} output channels",
            expected=f"{IMAGE_CHANNELS}, for colour images",
        )
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise CheckpointError(
            f"autoencoder {name} has a mean and scale per channel", expected="one scaling_factor"
        )
    for key, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"autoencoder {name}: {key} has values that are not finite")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Autoencoder(
        network=network.to(device).eval().requires_grad_(False),
        name=name,
        sha256=weights_sha256(network),
        scaling_factor=float(config.scaling_factor),
        shift=float(config.shift_factor or 0.0),
    )


def _load(name: str) -> Any:
    local = Path(name).is_dir()
    if not local and _looks_local(name):
        raise CheckpointError(
            f"no autoencoder at {name}",
            expected="a folder with config.json and safetensors",
            remedy="check the path, or give a Hub id such as stabilityai/sd-vae-ft-mse",
        )
    with _quiet():
        try:
            where = _place(name, local)
            network, report = AutoencoderKL.from_pretrained(
                name, **where, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
            )
        except CheckpointError:
            raise
        except Exception as problem:  # diffusers' own, safetensors', the Hub client's and the network's
            source = "" if local else " (neither a folder here nor to be fetched from the Hub)"
            raise CheckpointError(
                f"autoencoder {name} cannot be loaded{source}: {_first_line(problem)}",
                remedy="check the name and the files",
            ) from problem
    for verb, keys in (("lack", report["missing_keys"]), ("also have", report["unexpected_keys"])):
        if keys:
            raise CheckpointError(
                f"the weights of autoencoder {name} {verb} {sorted(keys)[0]} ({len(keys)} such tensors)",
                expected="the tensors of its config.json",
                remedy="copy or download it again",
            )
    return network


def _place(name: str, local: bool) -> dict[str, str]:
    """Arguments that lead diffusers to the autoencoder: none, or the subfolder of a pipeline.

    Raises:
        CheckpointError: a model of another kind is there.
    """
    folder = Path(name)
    where: dict[str, str] = {}
    if local and not (folder / CONFIG).is_file() and (folder / PIPELINE_FOLDER).is_dir():
        where = {"subfolder": PIPELINE_FOLDER}
    try:
        config = AutoencoderKL.load_config(name, **where)
    except OSError as problem:
        if not _is_absent(problem):
            raise
        where = {"subfolder": PIPELINE_FOLDER}
        config = AutoencoderKL.load_config(name, **where)
    kind = config.get("_class_name", AutoencoderKL.__name__)
    if kind != AutoencoderKL.__name__:
        raise CheckpointError(f"{name} is a {kind}", expected="an AutoencoderKL")
    return where


def _is_absent(problem: OSError) -> bool:
    """Whether the Hub has the repository but not the file, as against a network that does not answer."""
    cause = problem.__context__
    return isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError)


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers logs what it then raises or returns; we say it once, as an error."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def _looks_local(name: str) -> bool:
    """Hub ids are ``owner/name``."""
    return name.count("/") != 1 or name.startswith(("/", ".", "~")) or Path(name).parent.is_dir()


def _first_line(problem: Exception) -> str:
    text = str(problem).strip()
    return text.splitlines()[0][:300] if text else type(problem).__name__
