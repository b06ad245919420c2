"""Samples checked one by one as they are read, and stacked to batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dydit.config import DataConfig
from dydit.errors import DataError
from dydit.shapes import ModelShape
from dydit.training.data import Batch, LabelledImages, NamedImages, RedrawnImages
from dydit.training.order import ResumableBatches, Visit
from dydit.training.signals import leave_signals_to_parent, sigterm_blocked

log = logging.getLogger(__name__)

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
        if image.dtype != torch.float32:
            return DataError(f"{name} is {image.dtype}", expected="float32 in [-1, 1]", remedy=remedy)
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
