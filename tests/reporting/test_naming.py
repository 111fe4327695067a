"""Names of runs: what a pipeline writes is read back, and archived spellings are understood."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.cli import UserError
from lib.reporting.naming import (
    BRUTE_FORCE_RUN,
    MAIN_RUN,
    RunMode,
    RunName,
    canonical_order,
    label_of,
    model_label,
    resolve_run,
    row_order,
    sensitivity_parts,
)
from lib.reporting.scopes import Scope, parse_scopes
from lib.run_names import RunChoices

CHOICES = st.builds(
    RunChoices,
    spectral_splits=st.booleans(),
    spectral_discovery=st.booleans(),
    spectral_anchoring=st.booleans(),
    fast_anchoring=st.booleans(),
    decode_only=st.booleans(),
    incorrect_rules=st.booleans(),
    circuit_size=st.integers(1, 10**7) | st.floats(0, 1, exclude_min=True),
    min_flip_rate=st.sampled_from(["0.2", "0.3", "0.15", "1", "0.05"]),
    eval_intervention=st.sampled_from(["mean-positional", "zero", "mean-donor", "mean-donor-positional", "resample"]),
)


def choices(**changed):
    base = {
        "spectral_splits": False,
        "spectral_discovery": True,
        "spectral_anchoring": True,
        "fast_anchoring": True,
        "decode_only": True,
        "incorrect_rules": False,
        "circuit_size": 100_000,
        "min_flip_rate": "0.2",
        "eval_intervention": "mean-positional",
    }
    return RunChoices(**base | changed)


@given(CHOICES)
def test_names_round_trip(asked):
    parsed = RunName.parse(asked.run_name)
    assert parsed is not None
    assert (parsed.circuit_label, parsed.bag_label) == (asked.circuit_label, asked.bag_label)
    assert RunName.of(parsed.choices).text == asked.run_name
    assert parsed.is_fake == asked.incorrect_rules


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"circuit_size": 25000}, "rule_split-spectral_sample-M25000-decode_only-agonist_neurons-fast-spectral_anchor"),
        (
            {"spectral_splits": True, "spectral_discovery": False, "spectral_anchoring": False, "min_flip_rate": "0.3"},
            "spectral_split-decode_only-agonist_neurons-fast-random_anchor-tau0.3",
        ),
        (
            {"fast_anchoring": False, "decode_only": False, "incorrect_rules": True},
            "rule_split-spectral_sample-agonist_neurons-spectral_anchor-fake_targets",
        ),
        (
            {"eval_intervention": "mean-donor"},
            "rule_split-spectral_sample-decode_only-eval_mean-donor-agonist_neurons-fast-spectral_anchor",
        ),
    ],
)
def test_names_of_the_specification(changed, name):
    assert choices(**changed).run_name == name
    parsed = RunName.parse(name)
    assert parsed.choices.run_name == name


def test_the_five_modes_have_the_published_names():
    assert [mode.run_name.text for mode in RunMode] == [
        "rule_split-spectral_sample-decode_only-agonist_neurons-fast-spectral_anchor",
        "rule_split-spectral_sample-decode_only-agonist_neurons-fast-random_anchor",
        "rule_split-spectral_sample-decode_only-agonist_neurons-fast-spectral_anchor-fake_targets",
        "spectral_split-decode_only-agonist_neurons-fast-random_anchor",
        "rule_split-spectral_sample-decode_only-agonist_neurons-spectral_anchor",
    ]
    assert RunName.parse(MAIN_RUN).mode is RunMode.SPECTRAL_PLAN
    assert RunName.parse(BRUTE_FORCE_RUN).mode is RunMode.BRUTE_FORCE


@pytest.mark.parametrize("mode", RunMode)
def test_every_label_leads_back_to_its_mode(mode):
    for label in (mode.value, mode.stage_8_label, mode.stage_9_label):
        assert RunMode.from_label(label) is mode
    assert RunName.parse(mode.run_name.without_decode_only).mode is mode


def test_old_spellings_of_labels():
    assert RunMode.from_label("Rule split w/ random cov.") is RunMode.RANDOM_PLAN
    assert RunMode.from_label("Rule split + spectral anchor") is RunMode.SPECTRAL_PLAN
    assert RunMode.from_label("something else") is None


def test_a_donor_suffix_of_a_recheck_is_a_variant():
    parsed = RunName.parse(f"{MAIN_RUN}-mean-donor")
    assert (parsed.donor, parsed.variant, parsed.mode) == ("mean-donor", "mean-donor", RunMode.SPECTRAL_PLAN)
    assert parsed.bag_label == "agonist_neurons-fast-spectral_anchor-mean-donor"


def test_control_and_run_live_in_different_folders():
    fake = RunName.parse(f"{MAIN_RUN}-fake_targets")
    assert fake.discovery_base == "neural_circuit_discovery_results_fake_targets"
    assert RunName.parse(MAIN_RUN).discovery_base == "neural_circuit_discovery_results"
    assert fake.bag_label == RunName.parse(MAIN_RUN).bag_label


@pytest.mark.parametrize(
    "text",
    [
        "",
        "joint",
        "rule_split",
        f"{MAIN_RUN}-tau",
        f"x-{MAIN_RUN}",
        f"{MAIN_RUN}/..",
        f"{MAIN_RUN}-fake_targets-fake_targets",
        "Qwen2-M1",
    ],
)
def test_other_folders_are_no_runs(text):
    assert RunName.parse(text) is None
    assert label_of(text) == text


def test_sensitivity_parts_anywhere_in_the_name():
    assert sensitivity_parts(f"M25000-{MAIN_RUN}") == (sensitivity_parts(f"{MAIN_RUN}-M25000"))
    parts = sensitivity_parts(MAIN_RUN.replace("_sample-", "_sample-M80000-") + "-tau0.3")
    assert (parts.base, parts.circuit_size, parts.min_flip_rate) == (MAIN_RUN, 80000, 0.3)
    assert sensitivity_parts(MAIN_RUN.replace("_sample-", "_sample-M0.05-")).circuit_size == 0.05
    assert sensitivity_parts(MAIN_RUN) == sensitivity_parts(MAIN_RUN).__class__(MAIN_RUN, None, None)


def test_runs_without_decode_only_stand_in_for_those_with():
    plain = MAIN_RUN.replace("-decode_only", "")
    assert resolve_run(MAIN_RUN, [plain]) == plain
    assert resolve_run(MAIN_RUN, [plain, MAIN_RUN]) == MAIN_RUN
    assert resolve_run(MAIN_RUN, [f"{MAIN_RUN}-fake_targets"]) is None


def test_canonical_order_names_each_once():
    names = [BRUTE_FORCE_RUN, "joint", f"{MAIN_RUN}-tau0.3", MAIN_RUN, MAIN_RUN]
    assert canonical_order(names) == [MAIN_RUN, f"{MAIN_RUN}-tau0.3", BRUTE_FORCE_RUN, "joint"]


def test_tables_order_and_shorten_models():
    assert model_label("Qwen/Qwen2-7B-Instruct") == "Qwen2-7B" and model_label("EleutherAI/gpt-j-6B") == "GPT-J"
    rows = [
        ("hans_nli", "x/Y"),
        ("arithmetic", "Qwen/Qwen2-1.5B-Instruct"),
        ("arithmetic", "EleutherAI/gpt-j-6B"),
        ("arithmetic", "Qwen/Qwen2-7B-Instruct"),
        ("own_task", "x/Y"),
        ("bon_jailbreaking", "x/Y"),
    ]
    ordered = sorted(rows, key=lambda row: row_order(*row))
    assert [rows.index(row) for row in ordered] == [3, 2, 1, 5, 0, 4]


@pytest.mark.parametrize(
    ("text", "scope"),
    [
        ("test", Scope.TEST),
        ("Eval", Scope.TEST),
        ("held-out", Scope.TEST),
        ("legacy", Scope.TEST),
        ("legacy_test", Scope.TEST),
        ("HQ-T", Scope.TEST_SELECTED),
        ("held out selected", Scope.TEST_SELECTED),
        ("HQF", Scope.ALL_FIT),
        ("train+test", Scope.ALL_FIT),
        ("all", Scope.ALL_FIT),
        ("final_all_fit", Scope.ALL_FIT),
    ],
)
def test_scope_aliases(text, scope):
    assert Scope.parse(text) is scope
    assert Scope.parse(scope.label) is scope and Scope.parse(scope.published_label) is scope


def test_a_misspelt_scope_is_an_error_with_the_choices():
    with pytest.raises(UserError, match="'tset' is not a score scope; choose from test, test_selected, all_fit"):
        Scope.parse("tset")


def test_scope_lists():
    assert parse_scopes("both") == parse_scopes("test, all_fit") == (Scope.TEST, Scope.ALL_FIT)
    assert parse_scopes("all_fit,HQ-F,test") == (Scope.ALL_FIT, Scope.TEST)
    with pytest.raises(UserError):
        parse_scopes(" , ")
