"""Is the order of the scores better than chance? A few units really are ablated and compared with their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.eap.circuits import ScoreTable
from lib.eap.exact import ExactRuns
from lib.eap.pairs import Pair, PairBatch, for_each_batch
from lib.eap.scores import AttributionSettings
from lib.interventions import ReplacementTable
from lib.modeling_and_ablation import LanguageModel
from lib.neurons import parse_label

_N_PERMUTATIONS = 2000
_CHANCE_LEVEL = 0.05


def choose_units(table: ScoreTable, candidates: np.ndarray, n_units: int, generator: np.random.Generator) -> np.ndarray:
    """Half the strongest candidates, half random others, [unit] indices into the flattened table."""
    scores = np.abs(table.values.ravel()[candidates])
    order = candidates[np.argsort(-np.where(np.isfinite(scores), scores, -1), kind="stable")]
    n_top = min(n_units // 2, len(order))
    rest = order[n_top:]
    others = generator.choice(rest, min(n_units - n_top, len(rest)), replace=False)
    return np.concatenate([order[:n_top], np.sort(others)])


def ablation_effects(
    language_model: LanguageModel,
    pairs: Sequence[Pair],
    units: Sequence[tuple[str, int | None]],
    settings: AttributionSettings,
    table: ReplacementTable | None,
    *,
    batch_size: int,
) -> np.ndarray:
    """Metric change of each pair when each unit (component label, coordinate or None: all of it) is replaced.

    Returns [unit, pair].
    """
    effects = np.zeros((len(units), len(pairs)))
    by_component: dict[str, list[int]] = {}
    for number, (label, _) in enumerate(units):
        by_component.setdefault(label, []).append(number)

    def work(batch: PairBatch) -> None:
        runs = ExactRuns(language_model, batch, settings, table)
        for label, numbers in by_component.items():
            layer, head = parse_label(label)
            kind = "mlp" if head is None else "attention"
            change = runs.changes.mlp[layer] if head is None else runs.changes.head(language_model, layer, head)
            coordinates = [units[number][1] for number in numbers]
            if coordinates == [None]:
                found = runs.effect(kind, layer, change)
            else:
                found = runs.coordinate_effects(kind, layer, change, coordinates)
            effects[np.ix_(numbers, batch.numbers)] = found.cpu().numpy()

    for_each_batch(pairs, batch_size, language_model, work)
    return effects


def order_report(scores: np.ndarray, effects: np.ndarray, generator: np.random.Generator) -> dict[str, Any]:
    """Rank correlation of |score| [unit] with the mean |effect| of [unit, pair], and its permutation p-value."""
    left, right = _ranks(np.abs(scores)), _ranks(np.abs(effects).mean(axis=1))
    observed = _correlation(left, right)
    if observed is None:
        return {
            "n_units": len(scores),
            "n_pairs": effects.shape[1],
            "spearman": None,
            "p_value": None,
            "better_than_chance": False,
        }
    permuted = [_correlation(left, generator.permutation(right)) for _ in range(_N_PERMUTATIONS)]
    p_value = (1 + sum(value >= observed - 1e-12 for value in permuted)) / (1 + _N_PERMUTATIONS)
    return {
        "n_units": len(scores),
        "n_pairs": effects.shape[1],
        "spearman": observed,
        "p_value": p_value,
        "better_than_chance": p_value < _CHANCE_LEVEL,
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(values)


def _correlation(left: np.ndarray, right: np.ndarray) -> float | None:
    """Pearson correlation; None where one side is constant."""
    left, right = left - left.mean(), right - right.mean()
    scale = np.sqrt((left**2).sum() * (right**2).sum())
    return float((left * right).sum() / scale) if scale > 0 else None
