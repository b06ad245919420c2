from __future__ import annotations

import pytest
import torch

from dydit.errors import DataError
from dydit.evaluation.digit_classifier import DigitClassifier, DigitSplit
from dydit.evaluation.digit_quality import digit_quality, real_digit_quality


def test_real_digits_beat_noisy_ones_and_noise(classifier: DigitClassifier, split: DigitSplit) -> None:
    torch.manual_seed(0)
    images, labels = split.held_out_images[:200], split.held_out_labels[:200]
    real = real_digit_quality(classifier, split, num_samples=200)
    noisy = digit_quality(classifier, split, images + 0.5 * torch.randn_like(images), labels)
    noise = digit_quality(classifier, split, torch.randn_like(images), labels)
    assert real.frechet < noisy.frechet < noise.frechet
    assert real.class_accuracy > 0.95 > noise.class_accuracy
    assert real.num_samples == noisy.num_samples == 200
    assert real.num_reference == len(split.train_labels)


def test_wrong_labels_cost_accuracy_but_not_distance(classifier: DigitClassifier, split: DigitSplit) -> None:
    images, labels = split.held_out_images, split.held_out_labels
    right = digit_quality(classifier, split, images, labels)
    wrong = digit_quality(classifier, split, images, (labels + 1) % 10)
    assert right.frechet == wrong.frechet
    assert wrong.class_accuracy < 0.05


def test_reference_row_is_the_same_each_time_and_takes_all_by_default(
    classifier: DigitClassifier, split: DigitSplit
) -> None:
    assert real_digit_quality(classifier, split, 100) == real_digit_quality(classifier, split, 100)
    assert real_digit_quality(classifier, split).num_samples == len(split.held_out_labels)
    assert real_digit_quality(classifier, split, 10_000).num_samples == len(split.held_out_labels)


def test_metrics_carry_honest_names(classifier: DigitClassifier, split: DigitSplit) -> None:
    frechet, accuracy = real_digit_quality(classifier, split, 100).metrics()
    assert "digit-classifier features" in frechet.name
    assert "FID" not in frechet.name
    assert (frechet.better, accuracy.better, accuracy.unit) == ("lower", "higher", "%")
    assert 95.0 < (accuracy.value or 0.0) <= 100.0


def test_refuses_labels_that_do_not_fit(classifier: DigitClassifier, split: DigitSplit) -> None:
    with pytest.raises(DataError, match="100 images with labels of shape"):
        digit_quality(classifier, split, split.held_out_images[:100], split.held_out_labels[:99])
