"""The data model behind the rules: boosted trees on ranked features, and their exact SHAP values.

The values are XGBoost's own tree contributions (TreeSHAP of the fitted trees), so they explain the trees that the rules
come from. Training uses one thread unless told otherwise and gives the same trees in any process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lib.rule_atoms import RankedTable

if TYPE_CHECKING:
    import xgboost

# Coarse bins suffice for the trees' structure: the search moves every cut to its exact place afterwards.
N_BINS = 64
OPENMP_HINT = "XGBoost cannot be loaded; on macOS install OpenMP with: brew install libomp"


@dataclass(frozen=True)
class TreeSettings:
    """How trees are grown. `share_of_features` is tried at each node."""

    n_estimators: int = 40
    max_depth: int = 4
    learning_rate: float = 0.3
    subsample: float = 0.8
    share_of_features: float = 0.5
    n_jobs: int = 1


class TreeNodes(NamedTuple):
    """One tree as arrays over its nodes; node 0 is the root, `left` is -1 at leaves."""

    left: np.ndarray
    right: np.ndarray
    feature: np.ndarray
    cut: np.ndarray  # a row goes left if its rank is <= cut
    gain: np.ndarray


def import_xgboost() -> Any:
    """The xgboost module, with a hint where its OpenMP library is missing."""
    try:
        import xgboost
    except Exception as error:
        from lib.cli import UserError

        raise UserError(f"{OPENMP_HINT} ({error})") from error
    return xgboost


def tree_matrix(
    table: RankedTable, y: np.ndarray, weight: np.ndarray | None = None, n_jobs: int = 1
) -> xgboost.QuantileDMatrix:
    """The binned table with its target y [row], for any number of fits."""
    return import_xgboost().QuantileDMatrix(
        table.ranks.T.astype(np.float32), y, weight=weight, max_bin=N_BINS, nthread=n_jobs
    )


def fit_trees(
    matrix: xgboost.QuantileDMatrix,
    settings: TreeSettings,
    seed: int,
    *,
    importance: np.ndarray | None = None,
    logistic: bool = True,
) -> xgboost.Booster:
    """Boosted trees for the matrix's target.

    importance: [feature]; features are tried with probability proportional to it, as RuleSHAP asks. It stays with the
    matrix: fits without it come first.
    """
    if importance is not None:
        matrix.set_info(feature_weights=importance)
    parameters = {
        "objective": "binary:logistic" if logistic else "reg:squarederror",
        "tree_method": "hist",
        "max_bin": N_BINS,
        "max_depth": settings.max_depth,
        "eta": settings.learning_rate,
        "subsample": settings.subsample,
        "colsample_bynode": max(settings.share_of_features, 1 / matrix.num_col()),
        "min_child_weight": 1.0 if logistic else 2.0,
        "lambda": 1.0,
        "nthread": settings.n_jobs,
        "seed": seed,
        "verbosity": 0,
    }
    return import_xgboost().train(parameters, matrix, settings.n_estimators)


def tree_nodes(booster: xgboost.Booster) -> list[TreeNodes]:
    """The trees as arrays, cuts in ranks."""
    model = json.loads(booster.save_raw("json"))["learner"]["gradient_booster"]["model"]
    trees = []
    for tree in model["trees"]:
        threshold = np.asarray(tree["split_conditions"], dtype=float)
        trees.append(
            TreeNodes(
                np.asarray(tree["left_children"]),
                np.asarray(tree["right_children"]),
                np.asarray(tree["split_indices"]),
                # XGBoost sends a row left if its rank is < the threshold.
                (np.ceil(threshold) - 1).astype(np.int64),
                np.asarray(tree["loss_changes"], dtype=float),
            )
        )
    return trees


def shap_values(
    booster: xgboost.Booster, table: RankedTable, n_jobs: int = 1, *, approximate: bool = False
) -> np.ndarray:
    """SHAP values of the trees' margin, [row, feature]: exact, or the faster path attribution of Saabas."""
    matrix = import_xgboost().DMatrix(table.ranks.T.astype(np.float32), nthread=n_jobs)
    return booster.predict(matrix, pred_contribs=True, approx_contribs=approximate)[:, :-1].astype(float)


@dataclass(frozen=True)
class Explanation:
    """SHAP values of some rows. rows: their numbers in the explained sample, [row]; values: [row, feature]."""

    rows: np.ndarray
    values: np.ndarray

    @property
    def upper_importance_bound(self) -> np.ndarray:
        """Mean + standard deviation of |SHAP|, [feature]: published importance, high too for what matters rarely."""
        size = np.abs(self.values)
        return size.mean(axis=0) + size.std(axis=0)

    @property
    def weights(self) -> np.ndarray:
        """Importance as sampling weights, [feature]: positive, sum 1; all equal if nothing matters."""
        bound = np.maximum(self.upper_importance_bound, 1e-8)
        return bound / bound.sum()

    def statistics(self) -> dict[str, np.ndarray]:
        """The published statistics of |SHAP| by name, each [feature]."""
        size = np.abs(self.values)
        return {
            "mean": size.mean(axis=0),
            "std": size.std(axis=0),
            "min": size.min(axis=0),
            "max": size.max(axis=0),
            "median": np.median(size, axis=0),
            "percentile_75th": np.percentile(size, 75, axis=0),
            "upper_importance_bound": self.upper_importance_bound,
        }
