"""Cached latents as training samples, read from disk one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from dydit.errors import DataError
from dydit.latents.bad_data import OnBad, log_skipped
from dydit.latents.manifest import read_manifest
from dydit.latents.shards import MIRRORED, PLAIN, READ_ERRORS, check_bytes, check_header, read_labels

_POSTERIOR = 1  # marks the noise of posteriors among a run's seeded draws


class CachedLatents:
    """A cache as training samples: item i is (latent (C, h, w) float32 at the model's scale, label).

    A latent is drawn from its posterior each time it is read, so that a run does not see one frozen draw:
    ``(mean + std · noise − shift) · scaling_factor``. With ``[]`` the noise comes from torch's global
    generator; with ``redraw``, as in training, it is a function of a key. A cache made with flip has two
    items per image; the mirrored ones come after all others.

    Files are mapped, and one row is copied per item: the data set is never in memory.

    Args:
        path: the cache.
        sample: draw; False: the mean.
        verify: read every shard once and compare its checksum.
        on_bad: ``raise`` at a shard that is missing, altered or of another shape, or ``skip`` it, which is
            logged.

    Raises:
        DataError: the cache is not complete or has no shard to read, or ``on_bad`` is raise and one is bad;
            names it. From ``[]`` and ``redraw`` too, if that happens later.
    """

    def __init__(
        self, path: str | Path, sample: bool = True, verify: bool = True, on_bad: OnBad = "raise"
    ) -> None:
        self.path, self.sample = Path(path), sample
        self.manifest = read_manifest(self.path)
        self.settings = self.manifest.settings
        if not self.manifest.complete:
            raise DataError(
                f"{self.path} is not complete: {self.manifest.images} images so far",
                remedy="run the same `dydit encode` again to finish it",
            )
        self._shards, labels, skipped = [], [], []
        for entry in tqdm(self.manifest.shards, "checking latents", unit="shard", leave=False, disable=None):
            try:
                if verify:
                    check_bytes(self.path, entry)
                check_header(self.path, entry, self.settings)
                labels.append(read_labels(self.path, entry))
                self._shards.append(entry)
            except DataError as problem:
                if on_bad == "raise":
                    raise
                skipped.append(f"{problem}; with it its {len(entry.files)} images")
        log_skipped(self.path, skipped)
        if not labels:
            raise DataError(f"{self.path} has no shard that can be read", remedy="encode it again")
        self.labels = torch.cat(labels)
        self.num_classes = max(self.manifest.classes.values()) + 1
        self.sample_shape = self.settings.latent_shape
        self._ends = np.cumsum([len(entry.files) for entry in self._shards])
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.labels) * (2 if self.settings.flip else 1)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.redraw(index, int(torch.randint(2**62, ()))) if self.sample else self.redraw(index)

    def redraw(self, index: int, *key: int) -> tuple[Tensor, int]:
        """Item ``index`` with noise that depends on nothing but ``key`` and the index.

        Args:
            index: of the item.
            key: whole numbers from 0 on: in a training run its seed and the epoch. So neither a restart nor
                the process that reads the item changes it, and every epoch sees another draw.

        Raises:
            IndexError: there is no such item, which ends a loop over all.
            DataError: its shard cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        mirrored, image = divmod(index, len(self.labels))
        mean, std = self._posterior(image, MIRRORED if mirrored else PLAIN)
        z = mean + std * _noise(mean.shape, index, key) if self.sample else mean
        vae = self.settings.vae
        return (z - vae.shift) * vae.scaling_factor, int(self.labels[image])

    def file_of(self, index: int) -> str:
        """The image that item ``index`` was made from, by its path below the image folder."""
        shard, row = self._place(index % len(self.labels))
        return self._shards[shard].files[row]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # an open file does not cross to a loader process

    def _posterior(self, image: int, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
        shard, row = self._place(image)
        path = self.path / self._shards[shard].name
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(path, framework="pt")
            mean, std = (self._open[shard].get_slice(name)[row].float() for name in names)
        except READ_ERRORS as problem:
            raise DataError(f"{path} cannot be read ({problem})", remedy="encode it again") from problem
        return mean, std

    def _place(self, image: int) -> tuple[int, int]:
        """Shard and row of an image."""
        shard = int(np.searchsorted(self._ends, image, side="right"))
        return shard, image - (int(self._ends[shard - 1]) if shard else 0)


def _noise(shape: torch.Size, index: int, key: tuple[int, ...]) -> Tensor:
    """Standard normal noise, a pure function of its arguments."""
    # The spawn key keeps it apart from whatever else a run seeds with its seed and two numbers.
    low, high = np.random.SeedSequence((*key, index), spawn_key=(_POSTERIOR,)).generate_state(2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(high) << 32 | int(low)))
