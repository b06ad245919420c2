from __future__ import annotations

import pytest
import torch

from dydit.errors import ShapeError
from dydit.evaluation.digit_classifier import (
    FEATURE_DIM,
    DigitClassifier,
    DigitSplit,
    load_digit_split,
    train_digit_classifier,
)


def test_split_is_two_balanced_halves_of_all_digits(split: DigitSplit) -> None:
    assert len(split.train_labels) + len(split.held_out_labels) == 1797
    gap = split.train_labels.bincount(minlength=10) - split.held_out_labels.bincount(minlength=10)
    assert gap.abs().max() <= 1
    assert split.train_images.shape[1:] == (1, 8, 8)
    assert split.train_images.min() == -1.0
    assert split.train_images.max() == 1.0
    assert torch.equal(load_digit_split(seed=0).held_out_images, split.held_out_images)


def test_reaches_98_percent_on_images_it_has_not_seen(classifier: DigitClassifier, split: DigitSplit) -> None:
    assert classifier.held_out_accuracy >= 0.98
    right = classifier.predict(split.held_out_images) == split.held_out_labels
    assert classifier.held_out_accuracy == pytest.approx(right.double().mean().item())


def test_features_are_small_and_none_is_dead(classifier: DigitClassifier, split: DigitSplit) -> None:
    features = classifier.features(split.held_out_images)
    assert features.shape == (len(split.held_out_labels), FEATURE_DIM)
    assert not features.requires_grad
    assert features.std(dim=0).min() > 0.1


def test_values_no_picture_can_show_are_clamped(classifier: DigitClassifier, split: DigitSplit) -> None:
    images = split.held_out_images[:8]
    overshoot = torch.where(images == 1.0, 1.7, images)
    assert torch.equal(classifier.features(overshoot), classifier.features(images))


def test_training_is_reproducible_and_leaves_global_state_alone(split: DigitSplit) -> None:
    images, labels = split.train_images, split.train_labels
    few = DigitSplit(images[:64], labels[:64], images[64:128], labels[64:128])
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    first, second = train_digit_classifier(few, seed=3), train_digit_classifier(few, seed=3)
    assert torch.equal(first.features(few.held_out_images), second.features(few.held_out_images))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_refuses_other_images(classifier: DigitClassifier) -> None:
    with pytest.raises(ShapeError, match=r"\(2, 3, 32, 32\)"):
        classifier.features(torch.zeros(2, 3, 32, 32))
