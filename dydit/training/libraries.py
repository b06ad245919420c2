"""Data sets that other libraries read: Hugging Face `datasets` folders and webdataset shards, when installed."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Mapping
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dydit.config import DataConfig
from dydit.errors import ConfigError, DataError
from dydit.latents.image_folder import IMAGE_ENDINGS, centre_crop, to_signed

LABEL_ENDING = ".cls"


class HubImages:
    """A folder that ``datasets.Dataset.save_to_disk`` wrote: item i is ((3, side, side) in [-1, 1], label).

    The column of images is the first one of the library's type Image; labels are the first ClassLabel column,
    or the column ``label``.

    Args:
        path: the folder.
        side: of the samples in pixels.

    Raises:
        ConfigError: the library is not installed.
        DataError: the folder is not such a data set, or has no images or labels.
    """

    def __init__(self, path: str | Path, side: int) -> None:
        library = _library("datasets", "hf_datasets")
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
        self.num_classes = int(named if named is not None else max(self.rows[self.label]) + 1)
        self.side, self.sample_shape = side, (3, side, side)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        return _tensor(row[self.image], self.side), int(row[self.label])


class ShardedImages:
    """webdataset shards (``*.tar``): a sample is an image and its label in a ``.cls`` file of the same name.

    Read by index with the library's ``wids``, and not as a stream: only so is the position in an epoch one
    number, and a resumed run exact.

    Args:
        path: a folder of shards.
        side: of the samples in pixels.
        num_classes: of the model; shards do not tell.

    Raises:
        ConfigError: the library is not installed.
        DataError: there are no shards.
    """

    def __init__(self, path: str | Path, side: int, num_classes: int = 0) -> None:
        indexed = _library("wids", "webdataset", package="webdataset").IndexedTarSamples
        shards = sorted(Path(path).glob("*.tar"))
        if not shards:
            raise DataError(f"{path} has no shards", expected="files *.tar")
        self.shards = [(shard.name, indexed(str(shard))) for shard in shards]
        self.ends = list(accumulate(len(samples) for _, samples in self.shards))
        self.num_classes, self.side, self.sample_shape = num_classes, side, (3, side, side)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        shard = bisect_right(self.ends, index)
        name, samples = self.shards[shard]
        sample: Mapping[str, Any] = samples[index - (self.ends[shard - 1] if shard else 0)]
        where = f"{name}, sample {sample.get('__key__', index)}"
        image = next((value for key, value in sample.items() if key.lower().endswith(IMAGE_ENDINGS)), None)
        label = next((value for key, value in sample.items() if key.endswith(LABEL_ENDING)), None)
        if image is None or label is None:
            raise DataError(f"{where} lacks {'an image' if image is None else LABEL_ENDING}")
        try:
            return _tensor(Image.open(io.BytesIO(_bytes(image))), self.side), int(_bytes(label).strip())
        except Exception as problem:  # Pillow's decoders raise whatever broken bytes lead them to
            raise DataError(f"{where} cannot be read ({problem})") from problem


def hub_images(config: DataConfig) -> HubImages:
    """``data.name: hf_datasets``."""
    return HubImages(str(config.path), _side(config))


def sharded_images(config: DataConfig) -> ShardedImages:
    """``data.name: webdataset``."""
    return ShardedImages(str(config.path), _side(config))


def _side(config: DataConfig) -> int:
    if config.image_size is None:
        raise ConfigError(
            f"data.image_size is empty with data.name {config.name}",
            expected="the side of the images in pixels",
            remedy="set it to the model's sample_size",
        )
    return config.image_size


def _library(module: str, name: str, package: str | None = None) -> Any:
    try:
        return import_module(module)
    except ImportError as problem:
        raise ConfigError(
            f"data.name is {name} and {package or module} is not installed",
            remedy=f"pip install {package or module}",
        ) from problem


def _column(kinds: Mapping[str, str], kind: str, usual: str, path: str | Path) -> str:
    found = next((name for name, its in kinds.items() if its == kind), usual if usual in kinds else None)
    if found is None:
        raise DataError(f"{path} has the columns {', '.join(kinds)}", expected=f"one of type {kind}")
    return found


def _tensor(image: Image.Image, side: int) -> Tensor:
    pixels = np.array(centre_crop(image.convert("RGB"), side))
    return to_signed(torch.from_numpy(pixels).permute(2, 0, 1))


def _bytes(value: Any) -> bytes:
    if not hasattr(value, "read"):
        return bytes(value)
    value.seek(0)  # the library may hand out the same stream again
    return bytes(value.read())
