"""The TRAIN/TEST split: balanced over labels and over regions of the feature space, groups kept together.

Rows are clustered by their seed features, put in the order (label, cluster, random), and every fifth is TEST: a
systematic sample. So each label and each cluster gives its share to within one row, however small it is. Where rows
form groups (variants of one request), whole groups are sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lib.cli import derived_seed, rng
from lib.feature_moments import ROWS_PER_BLOCK, moments

TEST_SHARE = 0.2
MIN_CLUSTER_SIZE = 5
MAX_CLUSTERS = 200
EXPLAINED_VARIANCE = 0.95
MAX_PLAIN_DIMENSIONS = 10
"""With more columns than this, clusters are found in the leading principal components."""


@dataclass(frozen=True)
class Split:
    """Which rows are held out, and how they were chosen."""

    is_test: np.ndarray
    n_clusters: int
    n_groups: int | None
    """Number of groups that were kept together; None if rows were sampled singly."""

    def to_json(self) -> dict[str, int | float | None]:
        """For the run's metadata."""
        return {"n_rows": len(self.is_test), "n_test": int(self.is_test.sum()), "test_share": TEST_SHARE,
                "n_clusters": self.n_clusters, "n_groups": self.n_groups}


def split_rows(values: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, seed: int) -> Split:
    """Hold out a fifth of the rows.

    values: [row, feature] seed features. labels: int [row], any codes. groups: [row] keys of rows that belong
    together, or None; a single group cannot be split, so then its rows are.
    """
    clusters = cluster_rows(values, derived_seed(seed, "split", "clusters"))
    n_clusters = int(clusters.max(initial=0)) + 1
    stream = rng(seed, "split", "order")
    if groups is not None:
        units = np.unique(groups, return_inverse=True)[1]
        if units.max(initial=0) > 0:
            test_units = _systematic(_majority(units, labels), _majority(units, clusters), stream)
            return Split(test_units[units], n_clusters, len(test_units))
    return Split(_systematic(labels, clusters, stream), n_clusters, None)


def _systematic(labels: np.ndarray, clusters: np.ndarray, stream: np.random.Generator) -> np.ndarray:
    """Every fifth unit in the order (label, cluster, random), bool [unit]; at least one if there are two."""
    n_units = len(labels)
    order = np.lexsort((stream.random(n_units), clusters, labels))
    step = round(1 / TEST_SHARE)
    first = int(stream.integers(min(step, max(n_units, 1))))
    is_test = np.zeros(n_units, dtype=bool)
    if n_units > 1:
        is_test[order[first::step]] = True
    return is_test


def _majority(units: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The most frequent code of each unit's rows (the smallest of equals), [unit]."""
    pairs, counts = np.unique(np.stack([units, codes]), axis=1, return_counts=True)
    order = np.lexsort((pairs[1], -counts, pairs[0]))
    first = np.unique(pairs[0][order], return_index=True)[1]
    return pairs[1][order][first]


def cluster_rows(values: np.ndarray, seed: int) -> np.ndarray:
    """Cluster number of each row, int [row]; all 0 where the rows do not fall into clusters of a useful size."""
    n_rows = len(values)
    points = principal_components(values)
    n_clusters = min(n_rows // 8, MAX_CLUSTERS, n_rows // MIN_CLUSTER_SIZE)
    while points.shape[1] and n_clusters >= 2:
        found = _k_means(points, n_clusters, seed)
        if np.bincount(found, minlength=n_clusters).min() >= MIN_CLUSTER_SIZE:
            return found
        n_clusters = n_clusters * 4 // 5
    return np.zeros(n_rows, dtype=int)


def _k_means(points: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    # One thread: the order of sums, and so the clusters, must not depend on the machine's cores.
    with threadpool_limits(limits=1):
        return MiniBatchKMeans(n_clusters, random_state=seed, batch_size=2048, n_init="auto").fit_predict(points)


def principal_components(values: np.ndarray) -> np.ndarray:
    """Standardised columns [row, dimension], float32; of more than ten, the components of 95 % of the variance."""
    summary = moments(values)
    varied = np.flatnonzero(summary.variance > 0)
    mean, scale = summary.mean[varied], np.sqrt(summary.variance[varied])
    basis = np.eye(len(varied))
    if len(varied) > MAX_PLAIN_DIMENSIONS:
        strength, vectors = np.linalg.eigh(summary.correlation[np.ix_(varied, varied)])
        strength, vectors = np.maximum(strength[::-1], 0.0), vectors[:, ::-1]
        share = np.cumsum(strength) / strength.sum()
        basis = vectors[:, :int(np.searchsorted(share, EXPLAINED_VARIANCE)) + 1]
    points = np.empty((len(values), basis.shape[1]), dtype=np.float32)
    for start in range(0, len(values), ROWS_PER_BLOCK):
        block = values[start:start + ROWS_PER_BLOCK, varied]
        points[start:start + ROWS_PER_BLOCK] = ((block - mean) / scale) @ basis
    return points
