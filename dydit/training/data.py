"""Training samples: what a data set is, and a table of those that there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dydit.config import DataConfig
from dydit.errors import ConfigError, DataError
from dydit.latents.bad_data import LABEL_LIMIT
from dydit.latents.datasets import image_folder, latents
from dydit.shapes import ModelShape
from dydit.training.hub_images import hub_images
from dydit.training.procedural import SHAPES_SIDE, Shapes
from dydit.training.shards import sharded_images

DIGITS_SIDE = 8
DIGITS_CLASSES = 10
DIGITS_HALF_RANGE = 8.0  # grey levels are 0..16, so value / 8 - 1 lies in [-1, 1]


class LabelledImages(Protocol):
    """What the trainer needs of a data set; item i is (image (C, H, W) float32 in [-1, 1], label).

    For a model that takes text the label is its tokens (M, context_dim), and ``num_classes`` is 0.
    """

    num_classes: int
    sample_shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Any]: ...


@runtime_checkable
class RedrawnImages(Protocol):
    """A data set whose items differ by epoch: ``redraw`` gives one as a pure function of its arguments.

    The trainer asks it with the run's seed and the epoch, so that resuming is exact with any number of loader
    processes.
    """

    def redraw(self, index: int, *key: int) -> tuple[Tensor, Any]: ...


@runtime_checkable
class NamedImages(Protocol):
    """A data set that can tell where an item comes from, for messages."""

    def file_of(self, index: int) -> str: ...


class Digits:
    """The 1797 handwritten digits that come with scikit-learn: (1, 8, 8), ten classes."""

    num_classes = DIGITS_CLASSES
    sample_shape = (1, DIGITS_SIDE, DIGITS_SIDE)

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = torch.from_numpy(digits.images).float()[:, None] / DIGITS_HALF_RANGE - 1
        self.labels = [int(label) for label in digits.target]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def _digits(config: DataConfig) -> LabelledImages:
    if config.image_size not in (None, DIGITS_SIDE):
        raise ConfigError(
            f"data.image_size is {config.image_size} with data.name digits",
            expected=str(DIGITS_SIDE),
            remedy="leave data.image_size empty",
        )
    return Digits()


def _shapes(config: DataConfig) -> LabelledImages:
    return Shapes(config.image_size or SHAPES_SIDE, config.seed)


# Adding a data set is adding a row.
DATASETS: dict[str, Callable[[DataConfig], LabelledImages]] = {
    "digits": _digits,
    "image_folder": image_folder,
    "latents": latents,
    "shapes": _shapes,
    "hf_datasets": hub_images,
    "webdataset": sharded_images,
}


def make_dataset(config: DataConfig) -> LabelledImages:
    """The data set that ``data.name`` names.

    Raises:
        ConfigError: there is no such data set, or its settings do not fit it.
        DataError: it cannot be read, or a label is not below ``LABEL_LIMIT``.
    """
    if config.name not in DATASETS:
        raise ConfigError(f"data.name is {config.name}", expected="one of " + ", ".join(DATASETS))
    dataset = DATASETS[config.name](config)
    if dataset.num_classes > LABEL_LIMIT:
        raise DataError(
            f"{_highest_label(dataset)}{config.path} has {dataset.num_classes} classes",
            expected=f"labels below {LABEL_LIMIT:,}",
            remedy="correct the label, or the class map",
        )
    return dataset


def check_fits(dataset: LabelledImages, shape: ModelShape, skip_bad: bool = False) -> None:
    """Refuse a data set that the model cannot be trained on.

    Args:
        skip_bad: a sample whose label the model has no class for is one to skip, in its turn.

    Raises:
        DataError: it is empty, its images have another shape, it has more classes than the model, or
            classes for a model that takes text.
    """
    expected = (shape.in_channels, *shape.sample_size)
    if len(dataset) == 0:
        raise DataError("the data set has no samples", expected="at least one", remedy="check data.path")
    if tuple(dataset.sample_shape) != expected:
        raise DataError(
            f"the data set's images are {dataset.sample_shape}",
            expected=f"the model's {expected}",
            remedy="set data.image_size, or train another model",
        )
    if shape.takes_text and dataset.num_classes:
        raise DataError(
            f"the data set has {dataset.num_classes} classes",
            expected=f"text tokens ({shape.context_length}, {shape.context_dim}), which the model takes",
        )
    if dataset.num_classes > shape.num_classes and not skip_bad:
        raise DataError(
            f"{_highest_label(dataset)}the data set has {dataset.num_classes} classes",
            expected=f"at most the model's {shape.num_classes}",
            remedy="set on_class_mismatch=drop for a fresh label table, train a model with more classes, or "
            "leave these samples out with data.on_bad=skip",
        )


def _highest_label(dataset: LabelledImages) -> str:
    """Whose label it is that gives the data set so many classes, as far as it can tell: it may be stray."""
    labels = getattr(dataset, "labels", ())
    if not len(labels) or not isinstance(dataset, NamedImages):
        return ""
    index = int(np.argmax(np.asarray(labels)))
    return f"{dataset.file_of(index)} has label {int(labels[index])}, "


class Batch(NamedTuple):
    """Images (B, C, H, W) float32 in [-1, 1] and labels (B,) int64, or text tokens (B, M, context_dim)."""

    images: Tensor
    labels: Tensor
