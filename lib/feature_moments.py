"""Means and covariances of wide tables, block by block: float64 sums without a float64 copy of the table."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ROWS_PER_BLOCK = 16_384


class Moments(NamedTuple):
    """First and second moments of the columns of a table."""

    mean: np.ndarray
    """[feature]"""
    covariance: np.ndarray
    """[feature, feature], divided by n - 1"""

    @property
    def variance(self) -> np.ndarray:
        """Sample variance, [feature]."""
        return np.maximum(np.diagonal(self.covariance), 0.0)

    @property
    def correlation(self) -> np.ndarray:
        """Pearson correlation, [feature, feature]; 0 for a constant feature."""
        scale = np.sqrt(self.variance)
        inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
        return np.clip(self.covariance * inverse[:, None] * inverse[None, :], -1.0, 1.0)


def moments(values: np.ndarray) -> Moments:
    """Moments of `values`, [row, feature]; two passes, so large means cost no digits."""
    n_rows, n_features = values.shape
    mean = np.zeros(n_features)
    for start in range(0, n_rows, ROWS_PER_BLOCK):
        mean += values[start:start + ROWS_PER_BLOCK].sum(axis=0, dtype=np.float64)
    mean /= max(n_rows, 1)
    products = np.zeros((n_features, n_features))
    for start in range(0, n_rows, ROWS_PER_BLOCK):
        block = values[start:start + ROWS_PER_BLOCK] - mean
        products += block.T @ block
    return Moments(mean, products / max(n_rows - 1, 1))
