"""Every baseline that can be asked for runs on what set-up installs, and learns."""

from __future__ import annotations

import numpy as np
import pytest

from lib.rule_baselines import Baseline, best_cut, fit_baseline
from lib.rule_files import LabelledRows
from lib.rule_metrics import rule_scores

NAMES = ("a", "b", "c")


@pytest.mark.parametrize("baseline", list(Baseline))
def test_baseline_learns_a_threshold(baseline):
    random = np.random.default_rng(0)
    features, fresh = random.random((2, 60, 3))
    fitted = fit_baseline(baseline, LabelledRows(features, NAMES, features[:, 1] > 0.6), 0)
    assert rule_scores(fitted.predict(fresh), fresh[:, 1] > 0.6).mcc > 0.8
    assert fitted.n_rules >= 1
    assert fitted.n_conditions >= fitted.n_rules


@pytest.mark.parametrize("baseline", list(Baseline))
def test_one_class_gives_the_constant(baseline):
    fitted = fit_baseline(baseline, LabelledRows(np.ones((10, 3)), NAMES, np.ones(10, dtype=bool)), 0)
    assert fitted.predict(np.zeros((4, 3))).all()
    assert fitted.n_rules == 0


def test_cut_gives_the_best_mcc():
    votes = np.array([0.1, 0.1, 0.2, 0.3, 0.3, 0.8])
    y = np.array([0, 0, 1, 0, 1, 1])
    tried = {cut: rule_scores(votes > cut, y).mcc for cut in (0.15, 0.25, 0.55)}
    assert max(tried, key=tried.get) == pytest.approx(best_cut(votes, y)) == pytest.approx(0.15)
    assert best_cut(np.full(4, 0.7), np.array([0, 1, 1, 0])) == 0.5


def test_rare_targets_are_not_lost_to_a_share_of_one_half():
    # Where b holds, 3 of 10 rows are positive, elsewhere none: never a majority.
    features = np.tile(np.repeat([[0.0], [1.0]], [40, 10], axis=0), (4, 1))
    y = np.tile(np.arange(50) >= 47, 4)
    fitted = fit_baseline(Baseline.TREE, LabelledRows(features, ("b",), y), 0)
    assert fitted.predict(features).tolist() == (features[:, 0] > 0).tolist()
    assert fitted.n_rules == 1
