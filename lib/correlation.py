"""How two measured quantities go together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Correlation(NamedTuple):
    """Correlation of pairs of finite values: their number, Pearson's and Spearman's coefficient."""

    n: int
    pearson: float
    spearman: float


def correlate(left: np.ndarray, right: np.ndarray) -> Correlation | None:
    """Correlation of two columns [pair]; pairs with a value that is not finite are left out.

    None for fewer than 3 pairs or a constant column: nothing can be said of those.
    """
    from scipy.stats import rankdata

    pairs = np.stack([np.asarray(left, dtype=float), np.asarray(right, dtype=float)])
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    if pairs.shape[1] < 3 or (np.ptp(pairs, axis=1) == 0).any():
        return None
    pearson = float(np.corrcoef(pairs)[0, 1])
    return Correlation(pairs.shape[1], pearson, float(np.corrcoef(rankdata(pairs, axis=1))[0, 1]))
