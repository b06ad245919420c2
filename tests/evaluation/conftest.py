from __future__ import annotations

import pytest

from dydit.evaluation.digit_classifier import (
    DigitClassifier,
    DigitSplit,
    load_digit_split,
    train_digit_classifier,
)


@pytest.fixture(scope="session")
def split() -> DigitSplit:
    return load_digit_split(seed=0)


@pytest.fixture(scope="session")
def classifier(split: DigitSplit) -> DigitClassifier:
    return train_digit_classifier(split, seed=0)
