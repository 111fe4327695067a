"""Arithmetic: prompts, reading of answers, tolerance of quotients, and the 86 seed features against their row form."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lib.answers import first_line, first_number
from lib.cli import UserError
from lib.tasks.arithmetic_task import (
    TASK_SPEC,
    AnswerScoring,
    ArithmeticSettings,
    agrees,
    parse_problem,
)

NUMBERS = st.integers(0, 999)
PROBLEMS = st.tuples(NUMBERS, st.sampled_from("+-*/"), NUMBERS)


def task(**settings):
    return TASK_SPEC.configured(ArithmeticSettings(**settings))


def label(prompt: str, answer: str, **settings):
    return task(**settings).score_answers([{"prompt": prompt}], [answer])[0].label


def feature_values(prompts: list[str]) -> dict[str, np.ndarray]:
    columns = TASK_SPEC.native_columns(pd.DataFrame({"prompt": prompts}))
    return {feature.label: feature.native(columns) for feature in TASK_SPEC.SEED_FEATURES}


# ---------------------------------------------------------------- prompts


def test_the_published_set_has_359401_prompts():
    examples = TASK_SPEC.examples(seed=0)
    assert len(examples) == 3 * 300**2 + 299**2 == 359_401
    assert [examples[0]["prompt"], examples[1]["prompt"], examples[-1]["prompt"]] == ["0+0=", "0+1=", "299/299="]


def test_the_default_run_has_1261_prompts_with_two_examples_before_each():
    examples = task(max_operand=17, few_shot=2).examples(seed=0)
    assert len({example["prompt"] for example in examples}) == len(examples) == 3 * 18**2 + 17**2
    assert examples[0]["prompt"] == "2+3=5; 9-2=7; 0+0="
    assert not any("/0=" in example["prompt"] for example in examples)


def test_limit_shares_evenly_and_small_operators_give_all_they_have():
    # Operands 0..1 give 4 sums and 1 quotient: of 3 prompts, the quotient and 2 sums.
    examples = task(max_operand=1, operators="+/", limit=3).examples(seed=1)
    assert [example["operator_group"] for example in examples] == ["+", "+", "/"]
    assert examples == task(max_operand=1, operators="+/", limit=3).examples(seed=1)


def test_limit_draws_depend_on_the_seed():
    draws = [tuple(e["prompt"] for e in task(limit=40).examples(seed)) for seed in range(3)]
    assert len(set(draws)) == 3
    assert [draw[i].count("=") for draw in draws for i in range(40)] == [1] * 120


@pytest.mark.parametrize(
    "wrong",
    [
        {"operators": "+^"},
        {"operators": ""},
        {"operators": "++"},
        {"max_operand": 0},
        {"few_shot": 9},
        {"few_shot": 3, "operators": "+"},
        {"limit": -1},
        {"max_new_tokens": 0},
        {"division_digits": 0},
    ],
)
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(UserError, match="--"):
        ArithmeticSettings(**wrong)


@given(PROBLEMS)
def test_a_prompt_is_parsed_back_after_examples(problem):
    a, operator, b = problem
    parsed = parse_problem(f"2+3=5; 9-2=7; {a}{operator}{b}=")
    assert (parsed.operator, parsed.operands) == (operator, (str(a), str(b)))


@pytest.mark.parametrize(
    ("prompt", "truth"),
    [("3×4=", 12), ("8 ÷ 2 =", 4), ("2+3=5, 1−4=", -3), ("1.5+1=", Fraction(5, 2)), ("-3*2=", -6), ("7/0=", None)],
)
def test_truth_comes_from_the_operands(prompt, truth):
    assert parse_problem(prompt).truth == truth


@pytest.mark.parametrize("prompt", ["", "3+=", "import os", "3+4=; ", "2**3="])
def test_other_text_is_no_problem(prompt):
    assert parse_problem(prompt) is None


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12; 3+4=7", "12"),
        (" 12\n13", "12"),
        ("\n12", "12"),
        ("12", "12"),
        ("The sum is 12.", "12"),
        ("-4;", "-4"),
        ("−4;", "-4"),
        ("1,234;", "1234"),
        ("1,23", "1"),
        ("12,3456", "12"),
        ("0.5;", "0.5"),
        ("1. ", "1"),
        ("; 12", None),
        ("", None),
        ("none", None),
        ("7=7", "7"),
    ],
)
def test_the_value_is_the_first_number_before_a_semicolon_or_line_break(text, number):
    assert first_number(first_line(text, ";\n\r")) == number


@pytest.mark.parametrize(
    ("prompt", "answer", "right"),
    [
        ("12+3=", "15;", True),
        ("12+3=", "15.0", True),
        ("12+3=", "1", False),
        ("12+3=", "150", False),
        ("3-5=", "-2;", True),
        ("3-5=", "2;", False),
        ("40*50=", "2,000", True),
        ("3+4=", "3+4=7", False),
        ("4/2=", "2", True),
        ("4/2=", "2.0", True),
        ("4/2=", "20", False),
        ("4/2=", "2.1", False),
        # What a comparison of text prefixes would call right:
        ("1/2=", "0", False),
        ("150/1=", "1", False),
        ("29/2=", "14", False),
        ("7/2=", "3", False),
        # Rounded or cut off, to the decimals shown:
        ("1/3=", "0.3", True),
        ("1/3=", "0.33", True),
        ("2/3=", "0.66", True),
        ("2/3=", "0.67", True),
        ("2/3=", "0.6", True),
        ("2/3=", "0.65", False),
        ("2/3=", "0.0", False),
        ("1/8=", "0.12", True),
        ("1/8=", "0.13", True),
        ("1/300=", "0.00", False),
        ("17/6=", "2.9", False),
    ],
)
def test_labels_of_answers(prompt, answer, right):
    assert label(prompt, answer) is right


def test_more_digits_can_be_asked_of_quotients():
    assert [label("1/3=", answer, division_digits=2) for answer in ("0.3", "0.33", "0.333")] == [False, True, True]
    assert label("1/2=", "0.5", division_digits=9) is True  # exact


@given(st.fractions(min_value=-50, max_value=50, max_denominator=300), st.integers(1, 6))
def test_a_rounded_or_cut_quotient_agrees_and_one_three_units_off_does_not(truth, decimals):
    unit = Fraction(1, 10**decimals)
    for numerator in (round(truth / unit), math.trunc(truth / unit)):
        written = f"{float(numerator * unit):.{decimals}f}"
        if Fraction(written) != 0:
            assert agrees(written, truth, 1)
    assert not agrees(f"{float((round(truth / unit) + 3) * unit):.{decimals}f}", truth, 1)


def test_a_row_that_is_no_problem_has_no_label_and_stops_a_caller_that_needs_one():
    score = task().score_answers([{"prompt": "hello"}], ["3"])[0]
    assert score.label is None
    assert "hello" in score.reason
    with pytest.raises(UserError, match="no label"):
        task().is_answer_positive([{"prompt": "hello"}], ["3"])


@given(PROBLEMS, st.text("0123456789.,;-= \nab", max_size=8), st.text("0123456789.,;-= \nab", max_size=6))
def test_a_complete_answer_keeps_its_label_whatever_follows(problem, start, rest):
    a, operator, b = problem
    if operator == "/" and b == 0:
        return
    prompt = f"{a}{operator}{b}="
    if task().answer_is_complete(start):
        assert label(prompt, start + rest) == label(prompt, start)


@given(PROBLEMS, st.text("0123456789.,;-−= \nab٣", max_size=8), st.text("0123456789.,;-= \nab", max_size=6))
@example(("0", "+", "1"), "1,234", "5")
@example(("1", "+", "2"), "٣", "4")
@example(("97", "/", "100"), "1", ".0")
def test_a_settled_label_stays_whatever_follows(problem, start, rest):
    a, operator, b = problem
    if operator == "/" and b == 0:
        return
    prompt = f"{a}{operator}{b}="
    if task().label_is_settled({"prompt": prompt}, start):
        assert label(prompt, start + rest) == label(prompt, start)


@pytest.mark.parametrize(
    ("prompt", "text", "settled"),
    [
        ("8+8=", "1", False),
        ("8+8=", "16", False),
        ("8+8=", "7", True),
        ("8+8=", " 15", True),
        ("8+8=", "x", False),
        ("8+8=", "-1", True),
        ("8+8=", "0", False),
        ("8+8=", "0016", False),
        ("3-9=", "−", False),
        ("3-9=", "−6", False),
        ("3-9=", "6", True),
        ("5-5=", "-0", False),
        ("5-5=", "1", True),
        ("4/2=", "1", True),
        ("1/3=", "7", True),
        ("1/3=", "0", False),
        ("1/3=", "-0", True),
        ("97/100=", "1", False),
        ("29/2=", "15", False),
        ("29/2=", "16", True),
        ("1.5+1=", "7", True),
        ("1/0=", "7", False),
        ("no problem", "7", False),
    ],
)
def test_when_a_label_is_settled(prompt, text, settled):
    assert task().label_is_settled({"prompt": prompt}, text) is settled


def test_published_scoring_settles_nothing_early():
    assert not task(answer_scoring=AnswerScoring.PUBLISHED).label_is_settled({"prompt": "8+8="}, "7")


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("12", False),
        ("12.", False),
        ("12,", False),
        ("12;", True),
        ("12 ", True),
        ("12.5 ", True),
        ("-", False),
        ("", False),
        ("\n", False),
        ("x;", True),
        ("12,5", False),
        ("12,5 ", True),
    ],
)
def test_when_an_answer_is_complete(text, complete):
    assert task().answer_is_complete(text) is complete


@pytest.mark.parametrize(
    ("prompt", "answer", "right"),
    [
        ("1/2=", "0", True),
        ("150/1=", "1", True),
        ("4/2=", "20", False),
        ("7/2=", "3", True),
        ("12+3=", "15.0", False),
        ("3+5=", "8, 9", False),
        ("3+4=", "7\n", True),
        ("2+3=5; 3+4=", " 7", True),
    ],
)
def test_published_scoring(prompt, answer, right):
    assert label(prompt, answer, answer_scoring=AnswerScoring.PUBLISHED) is right


# ---------------------------------------------------------------- the cache


def test_the_cache_has_the_published_shape_and_comes_back_as_a_table():
    examples = [
        {"prompt": "3+4=", "operator_group": "+"},
        {"prompt": "3+5=", "operator_group": "+"},
        {"prompt": "4/2=", "operator_group": "/"},
    ]
    cache = task().cache_from_answers(examples, ["7\n", "x", "2.0 yes"])
    assert cache == {
        "+": [("3+4=", 7, "7\n", True, True), ("3+5=", None, "x", False, False)],
        "/": [("4/2=", 2.0, "2.0 yes", True, False)],
    }
    frame = task().dataset_from_cache(cache)
    assert frame.columns.tolist() == ["operator_group", "prompt", "num_out", "raw_output", "is_correct", "is_pure"]
    statistics = task().get_basic_statistics(frame)
    assert (statistics["accuracy"], statistics["n_correct"], statistics["pure_number_output_rate"]) == (2 / 3, 2, 1 / 3)
    assert statistics["accuracy_by_operator"]["+"] == {"n": 2, "accuracy": 0.5}


def test_longer_tuples_are_read_and_shorter_ones_skipped():
    cache = {"+": [("3+4=", 7, "7", True, True, "extra"), ("3+5=", 8, "8")]}
    assert task().dataset_from_cache(cache)["prompt"].tolist() == ["3+4="]


@pytest.mark.parametrize("cache", [[], {}, {"+": []}, [{"prompt": "x"}], {"+": 3}, "text"])
def test_other_caches_are_refused(cache):
    with pytest.raises(UserError):
        task().dataset_from_cache(cache)


# ---------------------------------------------------------------- features


def test_there_are_86_features_with_their_published_labels():
    labels = [feature.label for feature in TASK_SPEC.SEED_FEATURES]
    assert len(labels) == len(set(labels)) == 86
    for expected in (
        "Operands equal",
        "Operator: Division",
        "Divides evenly (any order)",
        "GCD > 1",
        "Carry in addition",
        "Relative closeness ≤ 10%",
        "Result in [275,300] (mul)",
        "op1 in [0,25]",
        "op2 in [275,300]",
        "Division: q_int in [27,30]",
    ):
        assert expected in labels


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # columns: 15+27=, 12+34=, 30-12=, 34-12=, 3-5=, 6/10=, 12*0=
        ("Carry in addition", [1, 0, 0, 0, 0, 0, 0]),
        ("Borrow in subtraction", [0, 0, 1, 0, 1, 0, 0]),
        ("Division denominator is power of 10", [0, 0, 0, 0, 0, 1, 0]),
        ("GCD > 1", [1, 1, 1, 1, 0, 1, 1]),
        ("Divides evenly (any order)", [0, 0, 0, 0, 0, 0, 0]),
        ("Operands share a digit", [0, 0, 0, 0, 0, 0, 0]),
        ("Right has more digits", [0, 0, 0, 0, 0, 1, 0]),
    ],
)
def test_features_of_hand_picked_prompts(name, expected):
    values = feature_values(["15+27=", "12+34=", "30-12=", "34-12=", "3-5=", "6/10=", "12*0="])
    assert values[name].tolist() == expected


def test_ranges_are_closed_and_do_not_apply_to_other_operators():
    values = feature_values(["20+5=", "20+6=", "20-5=", "7/2="])
    np.testing.assert_array_equal(values["Result in [0,25] (add)"], [1, 0, np.nan, np.nan])
    np.testing.assert_array_equal(values["Result in [25,50] (add)"], [1, 1, np.nan, np.nan])
    np.testing.assert_array_equal(values["Division: q_int in [3,6]"], [np.nan, np.nan, np.nan, 1])


def test_few_shot_examples_do_not_count():
    plain, prefixed = feature_values(["15+27="]), feature_values(["2+3=5; 9-2=7; 15+27="])
    for name in plain:
        np.testing.assert_array_equal(plain[name], prefixed[name], err_msg=name)


def test_every_feature_on_columns_equals_its_row_function():
    generator = np.random.default_rng(5)
    prompts = [f"{a}{o}{b}=" for o in "+-*/" for a, b in generator.integers(0, 320, size=(300, 2))]
    prompts += ["5+5=", "0+0=", "0/0=", "10/100=", "1.5+2=", "-12-7=", "-3*-4=", "100000-1=", "hello", "7/0="]
    frame = pd.DataFrame({"prompt": prompts})
    infos = [TASK_SPEC.parse_prompt_row(row) for row in frame.to_dict("records")]
    columns = TASK_SPEC.native_columns(frame)
    for feature in TASK_SPEC.SEED_FEATURES:
        namespace = {"math": math}
        exec(feature.python_src, namespace)  # our own source
        results = [namespace[feature.fn_name](prompt, info) for prompt, info in zip(prompts, infos, strict=True)]
        expected = [np.nan if value is None else float(value) for value in results]
        np.testing.assert_array_equal(feature.native(columns).astype(float), expected, err_msg=feature.label)


def test_info_of_a_prompt():
    assert TASK_SPEC.parse_prompt_row({"prompt": "2+3=5; 12-305="}) == {
        "operator": "-",
        "operand_a": 12.0,
        "a_int": 12,
        "len_a": 2,
        "digits_a": [1, 2],
        "sign_a": 1,
        "operand_b": 305.0,
        "b_int": 305,
        "len_b": 3,
        "digits_b": [3, 0, 5],
        "sign_b": 1,
    }
    assert TASK_SPEC.parse_prompt_row({"prompt": "hello"})["operator"] is None


@given(st.text(max_size=30))
def test_any_text_can_be_an_answer(text):
    assert label("3+4=", text) in (True, False)
    assert "\n" not in first_line(text)
