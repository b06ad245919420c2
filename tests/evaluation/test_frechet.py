from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from dydit.errors import DataError
from dydit.evaluation.frechet import frechet_distance


def gaussian(seed: int, count: int, dims: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dims, dims))
    return scale * rng.normal(size=(count, dims)) @ mixing + shift


def by_definition(first: np.ndarray, second: np.ndarray) -> float:
    """The formula as it is printed, with SciPy's matrix square root."""
    cov1, cov2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = np.real(sqrtm(cov1 @ cov2))
    return float(np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(cov1 + cov2 - 2 * root))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), dims=st.integers(2, 12), shift=st.floats(-3, 3))
def test_agrees_with_the_definition(seed: int, dims: int, shift: float) -> None:
    first, second = gaussian(seed, 60, dims), gaussian(seed + 1, 45, dims, shift=shift)
    assert frechet_distance(first, second) == pytest.approx(by_definition(first, second), rel=1e-6)


def test_one_dimension_has_the_textbook_value() -> None:
    first = np.array([[-1.0], [0.0], [1.0]])  # mean 0, standard deviation 1
    second = 3.0 * first + 2.0  # mean 2, standard deviation 3
    assert frechet_distance(first, second) == pytest.approx(2.0**2 + (3.0 - 1.0) ** 2)


def test_is_zero_for_equal_sets_and_symmetric() -> None:
    first, second = gaussian(0, 80, 8), gaussian(1, 70, 8)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))


def test_constant_dimensions_and_large_offsets_stay_finite_and_exact() -> None:
    first = np.hstack([gaussian(0, 50, 4), np.zeros((50, 2))])  # two dead features: singular covariance
    moved = first.astype(np.float32) + 1e3
    assert frechet_distance(moved, moved + np.float32(1.0)) == pytest.approx(6.0, rel=1e-3)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((8, 8)), "8 samples for 8-dim features; expected at least 9"),
        (np.zeros(8), "shape"),
        (np.full((20, 8), np.nan), "NaN"),
        (np.zeros((20, 7)), "7-dim features compared with 8-dim"),
    ],
)
def test_refuses_what_it_cannot_measure(features: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        frechet_distance(features, gaussian(0, 20, 8))
