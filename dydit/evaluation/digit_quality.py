"""Quality of sampled digits, and of real ones measured in the same way, to put the numbers in scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dydit.errors import DataError
from dydit.evaluation.digit_classifier import DigitClassifier, DigitSplit
from dydit.evaluation.frechet import frechet_distance
from dydit.evaluation.quality import Metric

FRECHET_NAME = "Fréchet distance (digit-classifier features)"
ACCURACY_NAME = "class accuracy (digit classifier)"


@dataclass(frozen=True)
class DigitQuality:
    """Quality of one set of digits.

    Attributes:
        frechet: squared Fréchet distance to the reference half, in digit-classifier features. It is
            biased upwards for few samples: compare only rows with equal ``num_samples``.
        class_accuracy: fraction classified as the label they were drawn for.
        num_samples: images measured.
        num_reference: real images they were compared with.
    """

    frechet: float
    class_accuracy: float
    num_samples: int
    num_reference: int

    def metrics(self) -> tuple[Metric, ...]:
        """The figures under the names they are reported with."""
        return (
            Metric(FRECHET_NAME, self.frechet, "lower"),
            Metric(ACCURACY_NAME, 100.0 * self.class_accuracy, "higher", "%"),
        )


def digit_quality(
    classifier: DigitClassifier, split: DigitSplit, images: Tensor, labels: Tensor
) -> DigitQuality:
    """Measure ``images`` (n, 1, 8, 8) in [−1, 1], drawn for ``labels`` (n,), against the training half.

    Raises:
        ShapeError: the images are not digits.
        DataError: images and labels differ in number, values are not finite, or there are no more
            images than features.
    """
    if labels.shape != images.shape[:1]:
        seen = f"{len(images)} images with labels of shape {tuple(labels.shape)}"
        raise DataError(seen, expected="one label each")
    reference = classifier.features(split.train_images)
    return DigitQuality(
        frechet=frechet_distance(classifier.features(images).numpy(), reference.numpy()),
        class_accuracy=classifier.accuracy(images, labels),
        num_samples=len(images),
        num_reference=len(reference),
    )


def real_digit_quality(
    classifier: DigitClassifier, split: DigitSplit, num_samples: int | None = None, seed: int = 0
) -> DigitQuality:
    """The reference row: real held-out digits in the place of samples.

    Args:
        num_samples: as many as the model drew, because the distance depends on the count; a random
            choice when there are more. None, or more than there are, takes the whole held-out half.
        seed: of that choice.
    """
    available = len(split.held_out_labels)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    chosen = order[: available if num_samples is None else num_samples]
    return digit_quality(classifier, split, split.held_out_images[chosen], split.held_out_labels[chosen])
