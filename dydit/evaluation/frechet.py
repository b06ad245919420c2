"""Fréchet distance between Gaussians fitted to two sets of features.

    d² = |μ₁ − μ₂|² + Tr(Σ₁) + Tr(Σ₂) − 2 Tr((Σ₁Σ₂)^½)

Dowson & Landau (1982); with Inception features it is the FID of Heusel et al. (NeurIPS 2017). The
metric libraries bind this formula to their own downloaded networks, so the few lines are written here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dydit.errors import DataError

FloatArray = NDArray[np.float64]


def frechet_distance(features: ArrayLike, reference: ArrayLike) -> float:
    """Squared Fréchet distance (the quantity FID reports) between two feature sets.

    With centred features Zᵢ, Σᵢ = ZᵢᵀZᵢ/(nᵢ−1) and Tr((Σ₁Σ₂)^½) is the sum of the singular values of
    Z₁Z₂ᵀ/√((n₁−1)(n₂−1)). Taking them from the QR factors never forms a covariance and never
    takes the root of a rounded negative eigenvalue, unlike a matrix square root of Σ₁Σ₂.

    Args:
        features: (n₁, F) features of the samples.
        reference: (n₂, F) features of the real images.

    Returns:
        The distance in squared feature units, ≥ 0; float64 throughout.

    Raises:
        DataError: wrong shapes, a value that is not finite, or no more samples than feature dimensions
            (the fitted covariance would be singular and the distance would measure the sample count).
    """
    first, second = _checked(features, "samples"), _checked(reference, "reference images")
    if first.shape[1] != second.shape[1]:
        raise DataError(
            f"{first.shape[1]}-dim features compared with {second.shape[1]}-dim ones",
            remedy="take both from the same feature network",
        )
    mean_gap = first.mean(axis=0) - second.mean(axis=0)
    root1, root2 = _covariance_root(first), _covariance_root(second)
    cross_trace = np.linalg.svd(root1 @ root2.T, compute_uv=False).sum()
    distance = mean_gap @ mean_gap + np.square(root1).sum() + np.square(root2).sum() - 2.0 * cross_trace
    return max(float(distance), 0.0)  # equal sets end a rounding error either side of zero


def _covariance_root(features: FloatArray) -> FloatArray:
    """R (F, F) with RᵀR = Σ, from the QR factorisation of the centred features."""
    centred = features - features.mean(axis=0)
    return np.linalg.qr(centred, mode="r") / np.sqrt(len(features) - 1)


def _checked(features: ArrayLike, what: str) -> FloatArray:
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2:
        raise DataError(f"features of the {what} have shape {array.shape}", expected="(images, dimensions)")
    count, dims = array.shape
    if count <= dims:
        raise DataError(
            f"{count} {what} for {dims}-dim features",
            expected=f"at least {dims + 1}: with fewer the fitted covariance is singular",
            remedy="draw more samples",
        )
    if not np.isfinite(array).all():
        raise DataError(f"features of the {what} contain NaN or infinity", remedy="look at the samples first")
    return array
