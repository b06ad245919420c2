"""``hf_datasets``: folders of Hugging Face's `datasets` library, where that is installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dydit.config import DataConfig
from dydit.errors import ConfigError, DataError
from dydit.latents.bad_data import LABEL_LIMIT, OnBad
from dydit.latents.image_folder import centre_crop, to_signed


class HubImages:
    """A folder that ``datasets.Dataset.save_to_disk`` wrote: item i is ((3, side, side) in [-1, 1], label).

    The column of images is the first one of the library's type Image; labels are the first ClassLabel column,
    or the column ``label``.

    Args:
        path: the folder.
        side: of the samples in pixels.
        on_bad: ``skip`` counts a number in the column ``label`` that is not below ``LABEL_LIMIT`` for no
            class, so that its row is skipped in its turn.

    Raises:
        ConfigError: the library is not installed.
        DataError: the folder is not such a data set, or has no images or labels; from ``[]``, for an image
            that cannot be read.
    """

    def __init__(self, path: str | Path, side: int, on_bad: OnBad = "raise") -> None:
        library = _library()
        self.path = path
        try:
            self.rows = library.load_from_disk(str(path))
        except Exception as problem:  # the library raises much, by version
            raise DataError(f"{path} is not a folder of the datasets library ({problem})") from problem
        if not hasattr(self.rows, "features"):  # a DatasetDict: several splits
            raise DataError(f"{path} has the splits {', '.join(self.rows)}", remedy="give the path of one")
        features = self.rows.features
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
        self.image = _column(kinds, "Image", "image", path)
        self.label = _column(kinds, "ClassLabel", "label", path)
        named = getattr(features[self.label], "num_classes", None)
        self.labels = self._whole_numbers(list(self.rows[self.label])) if named is None else []
        counted = [label for label in self.labels if on_bad == "raise" or label < LABEL_LIMIT]
        self.num_classes = 1 + max(counted, default=-1) if named is None else int(named)
        self.side, self.sample_shape = side, (3, side, side)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            row = self.rows[index]
            return square(row[self.image], self.side), int(row[self.label])
        except Exception as problem:  # Pillow's decoders raise whatever broken bytes lead them to
            raise DataError(f"{self.file_of(index)} cannot be read ({problem})") from problem

    def _whole_numbers(self, labels: list[Any]) -> list[int]:
        for row, label in enumerate(labels):
            if not isinstance(label, int):
                raise DataError(
                    f"{self.file_of(row)} has {label!r} in the column {self.label}",
                    expected="a whole number",
                    remedy=f"give each row one, or class_encode_column({self.label!r}) for words",
                )
        return labels

    def file_of(self, index: int) -> str:
        """The folder, and the row of item ``index``: the library does not keep the names of files."""
        return f"{self.path}, row {index}"


def hub_images(config: DataConfig) -> HubImages:
    """``data.name: hf_datasets``."""
    return HubImages(str(config.path), pixel_side(config), config.on_bad)


def pixel_side(config: DataConfig) -> int:
    """``data.image_size``, for a data set that has no size of its own.

    Raises:
        ConfigError: it is empty.
    """
    if config.image_size is None:
        raise ConfigError(
            f"data.image_size is empty with data.name {config.name}",
            expected="the side of the images in pixels",
            remedy="set it to the model's sample_size",
        )
    return config.image_size


def _library() -> Any:
    try:
        return import_module("datasets")
    except ImportError as problem:
        raise ConfigError(
            "data.name is hf_datasets and datasets is not installed", remedy="pip install datasets"
        ) from problem


def _column(kinds: Mapping[str, str], kind: str, usual: str, path: str | Path) -> str:
    found = next((name for name, its in kinds.items() if its == kind), usual if usual in kinds else None)
    if found is None:
        raise DataError(f"{path} has the columns {', '.join(kinds)}", expected=f"one of type {kind}")
    return found


def square(image: Image.Image, side: int) -> Tensor:
    """An image as training wants it, (3, side, side) float32 in [-1, 1]."""
    pixels = np.array(centre_crop(image.convert("RGB"), side))
    return to_signed(torch.from_numpy(pixels).permute(2, 0, 1))
