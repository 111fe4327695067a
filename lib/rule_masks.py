"""Rows as bits: 64 rows per word, so that a thousand rules on thousands of rows are counted in a millisecond."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_BLOCK_WORDS = 1 << 21
_HASH_SEED = 20240229


def pack(masks: np.ndarray) -> np.ndarray:
    """bool [..., row] -> uint64 [..., word]; the bits past the last row are 0."""
    packed = np.packbits(masks, axis=-1, bitorder="little")
    padding = -packed.shape[-1] % 8
    if padding:
        packed = np.concatenate([packed, np.zeros((*packed.shape[:-1], padding), dtype=np.uint8)], axis=-1)
    return np.ascontiguousarray(packed).view(np.uint64)


def unpack(packed: np.ndarray, n_rows: int) -> np.ndarray:
    """uint64 [..., word] -> bool [..., row]."""
    as_bytes = np.ascontiguousarray(packed).view(np.uint8)
    return np.unpackbits(as_bytes, axis=-1, bitorder="little", count=n_rows).view(bool)


def row_hashes(packed: np.ndarray) -> np.ndarray:
    """One 64-bit number per mask, [rule]; equal masks have equal numbers, others differ except by a rare accident."""
    rng = np.random.default_rng(_HASH_SEED)
    factors = rng.integers(1, 2**63, size=packed.shape[-1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    mixed = packed ^ (packed >> np.uint64(29))
    return (mixed * factors).sum(axis=-1, dtype=np.uint64)


@dataclass(frozen=True)
class TargetRows:
    """A binary target over rows, with optional row weights, ready to count packed masks.

    positive: bool [row]. weight: float [row] or None, which counts each row once.
    """

    positive: np.ndarray
    weight: np.ndarray | None = None
    positive_bits: np.ndarray = field(init=False)
    all_bits: np.ndarray = field(init=False)
    total: float = field(init=False)
    total_positive: float = field(init=False)

    def __post_init__(self) -> None:
        weight = np.ones(len(self.positive)) if self.weight is None else self.weight
        object.__setattr__(self, "positive_bits", pack(self.positive))
        object.__setattr__(self, "all_bits", pack(np.ones(len(self.positive), dtype=bool)))
        object.__setattr__(self, "total", float(weight.sum()))
        object.__setattr__(self, "total_positive", float(weight[self.positive].sum()))

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.positive)

    def counts(self, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(weight of positive rows, weight of all rows) of each packed mask, [...]."""
        if self.weight is not None:
            return self._weighted_counts(packed)
        positives = np.bitwise_count(packed & self.positive_bits).sum(axis=-1, dtype=np.int64)
        return positives.astype(float), np.bitwise_count(packed).sum(axis=-1, dtype=np.int64).astype(float)

    def _weighted_counts(self, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        columns = np.stack([np.where(self.positive, self.weight, 0.0), self.weight], axis=1)
        flat = packed.reshape(-1, packed.shape[-1])
        step = max(1, _BLOCK_WORDS // (64 * max(1, flat.shape[-1])))
        sums = [
            unpack(flat[start : start + step], self.n_rows).astype(float) @ columns
            for start in range(0, len(flat), step)
        ]
        both = np.concatenate(sums) if sums else np.zeros((0, 2))
        return both[:, 0].reshape(packed.shape[:-1]), both[:, 1].reshape(packed.shape[:-1])

    def mcc(self, n_true: np.ndarray, n_fire: np.ndarray) -> np.ndarray:
        """Matthews correlation from (positives covered, rows covered), elementwise; 0 where undefined."""
        positives, negatives = self.total_positive, self.total - self.total_positive
        covariance = n_true * self.total - n_fire * positives
        root = np.sqrt(np.maximum(n_fire * (self.total - n_fire), 0.0) * positives * negatives)
        return np.divide(covariance, root, out=np.zeros_like(root), where=root > 1e-9)
