"""RuleSHAP finds planted rules and nothing else; parts are checked against brute force."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from lib.data_model_for_shap import TreeNodes, TreeSettings, fit_trees, shap_values, tree_matrix, tree_nodes
from lib.rule_atoms import Atom, Literal, RankedTable, merged_atoms, quantile_cuts
from lib.rule_candidates import pair_conjunctions, scored_candidates
from lib.rule_conjunctions import Conjunctions, literal_counts, path_conjunctions
from lib.rule_controls import fake_target, permutation_null, stability
from lib.rule_induction import Sample, distinct_rows, stratified_rows
from lib.rule_masks import TargetRows
from lib.rule_metrics import rule_scores
from lib.rule_search import RulePath, RuleSearch, SearchLimits
from lib.rule_selection import choose_size, stratified_folds
from lib.ruleshap import RuleSHAP, RuleSHAPRegressor
from lib.text_and_rules import parse_rule

NAMES = tuple(f"f{j}" for j in range(12))


def table_of(n_rows=600, seed=0):
    random = np.random.default_rng(seed)
    features = random.random((n_rows, len(NAMES)))
    features[:, 8:10] = features[:, 8:10] > 0.5
    features[:, 10:] = np.floor(10 * features[:, 10:])
    return features


def target_of(text, features):
    return parse_rule(text).covers(dict(zip(NAMES, features.T, strict=True)))


def shape(rule):
    return sorted(tuple((c.feature, c.operator) for c in literal.conditions) for literal in rule.literals)


# ---------------------------------------------------------------- what is promised


@pytest.mark.parametrize(
    "text",
    [
        "f3 > 0.5 & f7 <= 0.2",
        "f1 > 0.3 & f1 <= 0.6",
        "(f0 > 0.6 & f1 <= 0.4) OR (f2 > 0.5 & f10 <= 2.5)",
        "(f8 <= 0.5 & f9 > 0.5) OR (f8 > 0.5 & f9 <= 0.5)",
        "f11 > 6.5",
    ],
)
def test_planted_rule_is_found_exactly(text):
    features = table_of(1500)
    y = target_of(text, features)
    model = RuleSHAP().fit(features, y, feature_names=NAMES)
    assert shape(model.rule_) == shape(parse_rule(text))
    assert np.array_equal(model.fires(features), y)
    assert model.reason_ == ""


def test_label_noise_adds_no_condition():
    features = table_of(1500)
    y = target_of("f3 > 0.5 & f7 <= 0.3", features) ^ (np.random.default_rng(1).random(1500) < 0.1)
    model = RuleSHAP().fit(features, y, feature_names=NAMES)
    assert shape(model.rule_) == [(("f3", ">"), ("f7", "<="))]


def test_pure_noise_gives_no_rule():
    features = table_of(400)
    models = [
        RuleSHAP(n_estimators=15, random_state=seed).fit(features, np.random.default_rng(seed).random(400) < 0.3)
        for seed in range(8)
    ]
    # Each may be a false alarm with probability 0.01.
    assert sum(bool(model.rule_.literals) for model in models) <= 1
    assert "chance" in next(model.reason_ for model in models if not model.rule_.literals)


def test_monotone_rescaling_of_features_changes_nothing():
    features = table_of(500)
    y = target_of("(f0 > 0.6 & f1 <= 0.5) OR (f10 > 7.5)", features) ^ (np.random.default_rng(2).random(500) < 0.1)
    stretched = features.copy()
    stretched[:, ::2] = np.exp(9 * stretched[:, ::2]) * 1e6
    plain, rescaled = (RuleSHAP(n_estimators=20).fit(matrix, y) for matrix in (features, stretched))
    assert np.array_equal(plain.fires(features), rescaled.fires(stretched))
    assert np.array_equal(plain.feature_importances_, rescaled.feature_importances_)
    assert shape(plain.rule_) == shape(rescaled.rule_)


def test_thresholds_are_midpoints_between_seen_values():
    features = np.array([[0.0], [1.0], [4.0], [9.0]] * 10)
    model = RuleSHAP().fit(features, features[:, 0] >= 4, feature_names=["x"])
    assert model.rule_ == parse_rule("x > 2.5")


def test_negative_and_few_positive_targets():
    features = table_of(300)
    one = RuleSHAP().fit(features, np.zeros(300, dtype=bool))
    assert one.rule_.text() == "FALSE"
    assert one.reason_ == "the target has one value only"
    assert not one.predict(features).any()
    lone = np.zeros(300, dtype=bool)
    lone[7] = True
    assert "too few rows" in RuleSHAP(n_estimators=5).fit(features, lone).reason_
    constant = RuleSHAP().fit(np.ones((50, 2)), np.arange(50) % 2 == 0)
    assert constant.rule_.text() == "FALSE"


def test_a_control_can_require_a_rule():
    features = table_of(200)
    y = np.random.default_rng(0).random(200) < 0.4
    model = RuleSHAP(n_estimators=10, require_rule=True, alpha=1e-9).fit(features, y)
    assert model.rule_.literals
    assert model.reason_


def test_same_seed_same_bytes_whatever_the_hash_seed():
    code = (
        "import numpy as np; from lib.ruleshap import RuleSHAP; r = np.random.default_rng(0); X = r.random((300, 8));"
        "y = (X[:, 1] > 0.5) ^ (r.random(300) < 0.2); m = RuleSHAP(n_estimators=10).fit(X, y);"
        "print(m.rule_.text(), [l.text() for l in m.rules_.literals], m.feature_importances_.tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_weights_count_as_repeated_rows():
    features = table_of(400)
    y = target_of("f3 > 0.5 & f7 <= 0.5", features)
    weight = np.where(np.arange(400) < 200, 2.0, 1.0)
    weighted = RuleSHAP(n_estimators=20).fit(features, y, sample_weight=weight)
    repeated = RuleSHAP(n_estimators=20).fit(np.vstack([features, features[:200]]), np.concatenate([y, y[:200]]))
    assert weighted.rule_ == repeated.rule_
    best = weighted.rules_.scores.at(0)
    assert best == repeated.rules_.scores.at(0)
    zero = RuleSHAP(n_estimators=20).fit(features, y, sample_weight=(np.arange(400) < 300).astype(float))
    assert zero.rule_ == RuleSHAP(n_estimators=20).fit(features[:300], y[:300]).rule_


def test_candidates_are_oriented_and_cover_different_rows():
    features = table_of(500)
    y = target_of("f0 > 0.5 & f1 > 0.5", features) ^ (np.random.default_rng(3).random(500) < 0.1)
    rules = RuleSHAP(n_estimators=20).fit(features, y, feature_names=NAMES).rules_
    columns = dict(zip(NAMES, features.T, strict=True))
    masks = [literal.covers(columns) for literal in rules.literals]
    assert len({mask.tobytes() for mask in masks}) == len(masks)
    for index in (0, 10, len(rules) - 1):
        assert rules.scores.at(index) == rule_scores(masks[index], y)
    assert (rules.scores.mcc >= 0).all()
    assert (np.diff(rules.scores.mcc) <= 1e-9).all()


def test_large_samples_are_searched_on_a_part_and_cut_on_all():
    features = table_of(3000)
    y = target_of("f3 > 0.5 & f7 <= 0.2", features)
    model = RuleSHAP(max_search_rows=600).fit(features, y, feature_names=NAMES)
    assert np.array_equal(model.fires(features), y)
    assert int(model.rules_.scores.n[0]) == 3000


def test_regressor_finds_the_upper_tail():
    features = table_of(800)
    y = 10.0 * target_of("f3 > 0.5 & f7 <= 0.2", features) + np.random.default_rng(0).random(800)
    model = RuleSHAPRegressor().fit(features, y, feature_names=NAMES)
    assert shape(model.rule_) == [(("f3", ">"), ("f7", "<="))]
    assert np.corrcoef(model.predict(features), y)[0, 1] > 0.98


@parametrize_with_checks(
    [RuleSHAP(n_estimators=8, n_splits=2, alpha=0.5), RuleSHAPRegressor(n_estimators=8, n_splits=2)],
    expected_failed_checks=lambda model: dict.fromkeys(
        ("check_sample_weight_equivalence_on_dense_data", "check_sample_weight_equivalence_on_sparse_data"),
        "trees and inner folds draw rows by number: one draw for a row of weight 2, two for a repeated row",
    ),
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def test_clone_keeps_parameters():
    assert clone(RuleSHAP(max_conditions=2, alpha=0.05)).get_params()["alpha"] == 0.05


# ---------------------------------------------------------------- the parts


def test_shap_values_add_up_to_the_margin_and_ignore_unused_features():
    features = table_of(300)
    table = RankedTable.of(features, NAMES)
    y = (features[:, 3] > 0.5).astype(float)
    booster = fit_trees(tree_matrix(table, y), TreeSettings(n_estimators=5, share_of_features=1.0, subsample=1.0), 0)
    values = shap_values(booster, table)
    assert values.shape == features.shape
    assert np.abs(values[:, 3]).mean() > 5 * np.abs(np.delete(values, 3, axis=1)).mean(axis=0).max()


def test_importance_steers_the_trees():
    table = RankedTable.of(table_of(300), NAMES)
    y = np.random.default_rng(0).random(300).round()
    weights = np.full(len(NAMES), 1e-9)
    weights[5] = 1.0
    settings = TreeSettings(n_estimators=10, share_of_features=1 / len(NAMES))
    booster = fit_trees(tree_matrix(table, y), settings, 0, importance=weights)
    used = {
        int(j) for tree in tree_nodes(booster) for j, left in zip(tree.feature, tree.left, strict=True) if left >= 0
    }
    assert used == {5}


def test_paths_contribute_every_part_of_them():
    features = table_of(200)
    table = RankedTable.of(features, NAMES)
    trees = tree_nodes(
        fit_trees(
            tree_matrix(table, target_of("f3 > 0.5 & f7 <= 0.4", features).astype(float)),
            TreeSettings(n_estimators=1, max_depth=2, subsample=1.0, share_of_features=1.0),
            0,
        )
    )
    conjunctions = path_conjunctions(trees, max_conditions=2)
    found = [conjunctions.atoms(index) for index in range(len(conjunctions))]
    tree = trees[0]
    root = Atom(int(tree.feature[0]), True, int(tree.cut[0]))
    assert (root,) in found
    assert (root._replace(above=False),) in found
    assert any(len(atoms) == 2 for atoms in found)
    # The tree's cut separates what XGBoost separates.
    assert {3, 7} >= {root.feature}


def test_pairs_see_what_single_features_do_not():
    features = table_of(800)
    table = RankedTable.of(features, NAMES)
    target = TargetRows(features[:, 8] != features[:, 9])
    pairs = pair_conjunctions(table, target, n_cuts=3, n_best=1)
    assert {atom.feature for atoms in pairs for atom in atoms} == {8, 9}
    assert len(pairs) == 4


def test_candidates_with_the_same_rows_appear_once_and_shortest():
    features = np.array([[0, 0], [0, 0], [1, 1], [1, 1], [0, 0], [1, 1]], dtype=float)
    table = RankedTable.of(features, ["a", "b"])
    target = TargetRows(np.array([0, 0, 1, 1, 0, 1], dtype=bool))
    a, b = Atom(0, True, 0), Atom(1, True, 0)
    against = Atom(1, False, 0)
    none = Conjunctions(np.zeros((0, 2), dtype=np.int64), np.zeros(0), np.zeros(0))
    conjunctions = none.including([(a, b), (a,), (b,), (against,)])
    found = scored_candidates(conjunctions, table, target, min_rows=1, limit=10)
    assert found.literals == [Literal((a,))]


def test_merging_keeps_the_tightest_bounds():
    atoms = [Atom(0, True, 3), Atom(0, True, 5), Atom(0, False, 9), Atom(0, False, 7), Atom(1, True, 0)]
    assert merged_atoms(atoms) == (Atom(0, False, 7), Atom(0, True, 5), Atom(1, True, 0))


def test_bulk_conjunctions_equal_those_made_one_by_one():
    # A stump below a stump below a stump, all three on one feature: the looser bound of each pair goes.
    tree = TreeNodes(
        left=np.array([1, -1, 3, -1, 5, -1, -1]),
        right=np.array([2, -1, 4, -1, 6, -1, -1]),
        feature=np.array([0, 0, 0, 0, 0, 0, 0]),
        cut=np.array([2, 0, 4, 0, 7, 0, 0]),
        gain=np.array([8.0, 0, 4.0, 0, 2.0, 0, 0]),
    )
    found = path_conjunctions([tree, tree], max_conditions=2)
    above2, above4, above7 = (Atom(0, True, cut) for cut in (2, 4, 7))
    upto2, upto4, upto7 = (Atom(0, False, cut) for cut in (2, 4, 7))
    expected = [(upto2,), (upto4,), (upto7,), (above2,), (above4,), (above7,)]
    expected += [(upto4, above2), (upto7, above2), (upto7, above4)]
    assert [found.atoms(index) for index in range(len(found))] == expected
    gains = {found.atoms(index): (found.gain_sum[index], found.gain_max[index]) for index in range(len(found))}
    assert gains[(upto4, above2)] == (12.0, 8.0)
    assert gains[(upto7, above4)] == (6.0, 4.0)


def test_bulk_counts_equal_masks():
    table = RankedTable.of(table_of(130), NAMES)
    for weight in (None, np.random.default_rng(1).random(130)):
        target = TargetRows(np.arange(130) % 3 == 0, weight)
        literals = [
            Literal((Atom(0, True, 40),)),
            Literal((Atom(0, True, 40), Atom(5, False, 90), Atom(8, True, 0)), negated=True),
            Literal((Atom(0, False, 60), Atom(0, True, 20))),
        ]
        n_true, n_fire = literal_counts(literals, table, target)
        for index, literal in enumerate(literals):
            fires = table.rule_mask((literal,))
            each = np.ones(130) if weight is None else weight
            assert n_fire[index] == pytest.approx(each[fires].sum())
            assert n_true[index] == pytest.approx(each[fires & target.positive].sum())


def test_quantile_cuts_part_the_rows():
    assert quantile_cuts(np.array([0, 1, 2, 3]), 9).tolist() == [0, 1, 2]
    assert quantile_cuts(np.arange(100), 3).tolist() == [24, 49, 74]
    assert quantile_cuts(np.zeros(5, dtype=int), 3).tolist() == []


def test_search_equals_brute_force_on_a_small_problem():
    random = np.random.default_rng(5)
    features = random.integers(0, 2, (60, 5)).astype(float)
    y = random.random(60) < 0.2 + 0.5 * features[:, 0] * features[:, 1] + 0.3 * features[:, 2]
    table = RankedTable.of(features, NAMES[:5])
    target = TargetRows(y)
    search = RuleSearch(table, target, SearchLimits(max_conditions=2, max_literals=2))
    atoms = [Atom(j, above, 0) for j in range(5) for above in (False, True)]
    literals = [Literal((atom,)) for atom in atoms] + [
        Literal(tuple(sorted(pair))) for pair in itertools.combinations(atoms, 2) if pair[0].feature != pair[1].feature
    ]
    path = search.path(literals)
    best = {
        cost: max(
            search.score(rule)
            for size in (1, 2)
            for rule in itertools.combinations(literals, size)
            if sum(literal.cost for literal in rule) <= cost
        )
        for cost in range(1, 5)
    }
    for cost, (score, _) in enumerate(path.monotone()):
        if cost:
            assert score == pytest.approx(best[cost])


def test_cut_line_search_equals_trying_every_cut():
    random = np.random.default_rng(6)
    features = np.round(random.random((200, 2)), 2)
    y = random.random(200) < np.where(features[:, 0] > 0.37, 0.8, 0.1)
    table = RankedTable.of(features, ["a", "b"])
    for weight in (None, random.random(200) + 0.5):
        target = TargetRows(y, weight)
        search = RuleSearch(table, target, SearchLimits(bank_cuts=0))
        for above in (False, True):
            cut = search.best_cut(np.zeros_like(target.all_bits), (), Atom(0, above, 0))
            tried = [search.score((Literal((Atom(0, above, k),)),)) for k in range(len(table.values[0]) - 1)]
            assert tried[cut] == pytest.approx(max(tried))


def test_path_prefers_fewer_literals_and_refuses_too_long_rules():
    path = RulePath(max_cost=2)
    one = (Literal((Atom(0, True, 0), Atom(1, True, 0))),)
    two = (Literal((Atom(0, True, 0),)), Literal((Atom(1, True, 0),)))
    assert path.offer(0.5, two)
    assert path.offer(0.5, one)
    assert not path.offer(0.5, two)
    assert not path.offer(0.9, (*one, *two))
    assert [score for score, _ in path.monotone()] == [0.0, 0.0, 0.5]


def test_size_choice_takes_the_shortest_within_one_standard_error():
    random = np.random.default_rng(7)
    y = random.random(1000) < 0.3
    good = y ^ (random.random(1000) < 0.1)
    hardly_better = good.copy()
    # Three rows told apart, two of them rightly: better, but not beyond what three rows can say.
    changed = [*np.flatnonzero(good != y)[:2], np.flatnonzero(good == y)[0]]
    hardly_better[changed] ^= True
    poor = y ^ (random.random(1000) < 0.3)
    choice = choose_size(np.stack([np.zeros(1000, dtype=bool), poor, good, hardly_better])[None], y, alpha=0.01)
    assert choice.best_cost == 3
    assert choice.chosen_cost == 2
    chance = choose_size(np.stack([np.zeros(1000, dtype=bool), random.random(1000) < 0.3])[None], y, alpha=0.01)
    assert chance.chosen_cost == 0


def test_influence_predicts_the_spread_of_the_correlation():
    from lib.rule_selection import _counts, _influence

    random = np.random.default_rng(8)
    y = random.random(400) < 0.3
    fires = y ^ (random.random(400) < 0.2)
    influence = _influence(fires[None], y, np.ones(400), _counts(fires[None], y, np.ones(400)))
    resampled = [rule_scores(fires[rows], y[rows]).mcc for rows in random.integers(0, 400, (2000, 400))]
    assert influence.std() / np.sqrt(400) == pytest.approx(np.std(resampled), rel=0.1)


def test_folds_and_samples_keep_the_share_of_positives():
    y = np.arange(100) < 20
    folds = stratified_folds(y, 5, np.random.default_rng(0))
    assert [int(y[folds == fold].sum()) for fold in range(5)] == [4] * 5
    rows = stratified_rows(y, 50, 0)
    assert len(rows) == 50
    assert y[rows].sum() == 10
    assert np.array_equal(stratified_rows(y, 100, 0), np.arange(100))


def test_distinct_rows_are_the_first_of_each():
    features = np.array([[1, 2], [1, 2], [1, 2], [3, 4]])
    assert distinct_rows(features, np.array([0, 0, 1, 0])).tolist() == [0, 2, 3]


# ---------------------------------------------------------------- controls


def test_fake_target_keeps_counts_and_hardly_correlates():
    random = np.random.default_rng(0)
    y, is_test = random.random(500) < 0.3, np.arange(500) >= 400
    fake = fake_target(y, is_test, random, max_abs_corr=0.02, max_tries=500)
    assert fake.is_within_bound
    assert abs(fake.correlation) <= 0.02
    assert fake.correlation == pytest.approx(np.corrcoef(y, fake.y)[0, 1])
    assert fake.y[~is_test].sum() == y[~is_test].sum()
    hopeless = fake_target(np.array([True, False]), np.zeros(2, dtype=bool), random, max_abs_corr=0.1, max_tries=3)
    assert not hopeless.is_within_bound
    assert hopeless.tries in (1, 2, 3)


def test_permutation_null_separates_signal_from_noise():
    features = table_of(300)
    model = RuleSHAP(n_estimators=10)
    sample = Sample.of(features, target_of("f3 > 0.5", features), NAMES)
    null = permutation_null(sample, model.induction_settings(), 1, range(9), 0)
    assert null.observed_score == pytest.approx(1.0)
    assert null.score_p_value == pytest.approx(0.1)
    assert null.scores.max() < 0.5
    assert null.importance_p_values[3] == pytest.approx(0.1)
    assert (np.delete(null.importance_p_values, 3) > 0.1).mean() > 0.8


def test_stability_of_a_planted_and_of_an_arbitrary_rule():
    features = table_of(300)
    sample = Sample.of(features, target_of("f3 > 0.5", features), NAMES)
    settings = RuleSHAP(n_estimators=10).induction_settings()
    assert stability(sample, settings, parse_rule("f3 > 0.5"), range(5), 0).rule == 1.0
    assert stability(sample, settings, parse_rule("f4 > 0.5"), range(5), 0).literals == (0.0,)
