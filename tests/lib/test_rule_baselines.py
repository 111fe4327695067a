"""Every baseline that can be asked for runs on what set-up installs, and learns."""

from __future__ import annotations

import numpy as np
import pytest

from lib.rule_baselines import Baseline, fit_baseline
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
