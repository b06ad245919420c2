"""Training samples: a table of data sets, checks on every sample, and an order that can be resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dydit.config import DataConfig
from dydit.errors import ConfigError, DataError
from dydit.latents.bad_data import LABEL_LIMIT
from dydit.latents.datasets import image_folder, latents
from dydit.shapes import ModelShape
from dydit.training.hub_images import hub_images
from dydit.training.procedural import SHAPES_SIDE, Shapes
from dydit.training.shards import sharded_images
from dydit.training.signals import leave_signals_to_parent, sigterm_blocked

log = logging.getLogger(__name__)

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


class Visit(NamedTuple):
    """A sample's turn: which one, and in which epoch."""

    sample: int
    epoch: int


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


STAND_INS = 64  # samples drawn for a bad one before all are tried


class GoodSample(NamedTuple):
    """A sample, and the bad ones in whose place it is: index -> what is wrong."""

    image: Tensor
    label: Any
    skipped: dict[int, str]


class CheckedSamples(Dataset):
    """A data set whose items are checked one by one; a bad one comes back as a DataError, not raised.

    A value crosses from a loader process as it is; a raised error would come out wrapped in a traceback.
    With ``skip_bad`` another good sample takes the place of a bad one, the next if it can, and tells of it.

    Args:
        dataset: the samples.
        shape: of the model that they are for.
        skip_bad: replace bad ones.
        seed: of data sets that draw (``RedrawnImages``).
    """

    def __init__(
        self, dataset: LabelledImages, shape: ModelShape, skip_bad: bool = False, seed: int = 0
    ) -> None:
        self.dataset, self.shape, self.skip_bad, self.seed = dataset, shape, skip_bad, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, visit: Visit) -> GoodSample | DataError:
        problem = DataError("the data set has no samples")
        skipped: dict[int, str] = {}
        for index in self._candidates(visit):
            result = self._checked(index, visit.epoch)
            if not isinstance(result, DataError):
                return GoodSample(*result, skipped)
            problem = result
            skipped[index] = str(problem)
        return problem

    def _candidates(self, visit: Visit) -> Iterator[int]:
        """The sample itself; then what may stand in for it: the next one, some others, at last all."""
        yield visit.sample
        if not self.skip_bad:
            return
        count = len(self)
        yield (visit.sample + 1) % count
        # Where many in a row are bad, as a class that the model has not, one neighbour would stand for all.
        yield from np.random.default_rng((self.seed, *visit)).integers(count, size=STAND_INS).tolist()
        yield from ((visit.sample + offset) % count for offset in range(2, count))

    def _checked(self, index: int, epoch: int) -> tuple[Tensor, Any] | DataError:
        remedy = "" if self.skip_bad else "repair it, or set data.on_bad=skip"
        known = getattr(self.dataset, "labels", ())  # of all samples, or of all that are not mirrored
        if len(known) and (bad := _bad_label(int(known[index % len(known)]), self.shape)):
            return DataError(f"{self._name(index)} has {bad[0]}", expected=bad[1], remedy=remedy)
        try:
            image, label = self._read(index, epoch)
        except DataError as problem:  # it names the file
            return DataError(f"sample {index} cannot be read: {problem}", remedy=remedy)
        except Exception as problem:  # decoders raise whatever broken bytes lead them to
            reason = problem if isinstance(problem, (OSError, ValueError)) else repr(problem)
            return DataError(f"{self._name(index)} cannot be read: {reason}", remedy=remedy)
        name = self._name(index)
        if bad := _bad_label(label, self.shape):
            return DataError(f"{name} has {bad[0]}", expected=bad[1], remedy=remedy)
        if tuple(image.shape) != self.dataset.sample_shape:
            wanted = f"shape {self.dataset.sample_shape}"
            return DataError(f"{name} has shape {tuple(image.shape)}", expected=wanted, remedy=remedy)
        if not image.isfinite().all():
            return DataError(f"{name} has values that are not finite", remedy=remedy)
        return image, label

    def _name(self, index: int) -> str:
        file = f" ({self.dataset.file_of(index)})" if isinstance(self.dataset, NamedImages) else ""
        return f"sample {index}{file}"

    def _read(self, index: int, epoch: int) -> tuple[Tensor, Any]:
        if isinstance(self.dataset, RedrawnImages):
            return self.dataset.redraw(index, self.seed, epoch)
        return self.dataset[index]


def _bad_label(label: Any, shape: ModelShape) -> tuple[str, str] | None:
    """What is wrong with a label, and what was expected; None for a good one."""
    if not shape.takes_text:
        wanted = f"0 to {shape.num_classes - 1}"
        return None if 0 <= label < shape.num_classes else (f"label {label}", wanted)
    expected = (shape.context_length, shape.context_dim)
    if not isinstance(label, Tensor) or tuple(label.shape) != expected:
        seen = tuple(label.shape) if isinstance(label, Tensor) else label
        return f"text of shape {seen}", f"tokens {expected}"
    return None if label.isfinite().all() else ("text with values that are not finite", "finite tokens")


def collate(samples: list[GoodSample | DataError]) -> tuple[Batch, dict[int, str]] | DataError:
    """Stack samples to a ``Batch``, beside what they skipped; the first error, if any, stands for all."""
    good: list[GoodSample] = []
    skipped: dict[int, str] = {}
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        good.append(sample)
        skipped.update(sample.skipped)
    labels = [torch.as_tensor(sample.label) for sample in good]
    return Batch(torch.stack([sample.image for sample in good]), torch.stack(labels)), skipped


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """Order (length,) in which epoch ``epoch`` visits the samples: a pure function of its arguments."""
    return np.random.default_rng((seed, epoch)).permutation(length)


class ResumableBatches(Sampler[list[Visit]]):
    """Endless batches of samples for one process, from any position on.

    The stream of all processes together is the epochs' orders laid end to end; sample number k of it is
    ``epoch_order(length, seed, k // length)[k % length]``. A step takes the next ``world · batch`` samples,
    process ``rank`` every ``world``-th of them. So the position is one number, no sample is dropped at the
    end of an epoch, and a run may go on with another number of processes.

    Args:
        length: samples in the data set.
        seed: of the order.
        batch: samples per process.
        rank: of this process.
        world: number of processes.
        position: samples that all processes together have consumed.
    """

    def __init__(
        self, length: int, seed: int, batch: int, rank: int = 0, world: int = 1, position: int = 0
    ) -> None:
        self.length, self.seed, self.batch = length, seed, batch
        self.rank, self.world, self.position = rank, world, position

    def __iter__(self) -> Iterator[list[Visit]]:
        position, size = self.position, self.batch * self.world
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            visits = []
            for number in range(position + self.rank, position + size, self.world):
                if number // self.length != epoch:
                    epoch = number // self.length
                    order = epoch_order(self.length, self.seed, epoch)
                visits.append(Visit(int(order[number % self.length]), epoch))
            yield visits
            position += size


def batches(
    dataset: LabelledImages, config: DataConfig, shape: ModelShape, seed: int, *,
    position: int = 0, rank: int = 0, world: int = 1, pin_memory: bool = False,
) -> Iterator[Batch]:  # fmt: skip
    """Endless batches of ``config.batch_size`` samples for this process, from ``position`` on.

    With ``on_bad`` skip every bad sample is logged the first time.

    Raises:
        DataError: a sample is unreadable or its label lies outside the model's table (``on_bad`` raise).
    """
    loader = DataLoader(
        CheckedSamples(dataset, shape, config.on_bad == "skip", seed),
        batch_sampler=ResumableBatches(len(dataset), seed, config.batch_size, rank, world, position),
        num_workers=config.num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator().manual_seed(seed),  # or the loader would draw from the global one
    )
    told: set[int] = set()
    for loaded in _started(loader):
        if isinstance(loaded, DataError):
            raise loaded
        batch, skipped = loaded
        for index in sorted(skipped.keys() - told):
            log.warning("skipped: %s", skipped[index])
        told |= skipped.keys()
        yield batch


def _started(loader: DataLoader) -> Iterator[Any]:
    with sigterm_blocked():  # in the loader processes, from their first moment on
        return iter(loader)


def epochs_seen(position: int, length: int) -> int:
    """Whole passes over the data set after ``position`` samples."""
    return position // length
