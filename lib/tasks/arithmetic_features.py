"""The 86 seed features of arithmetic prompts, each as a row function (its readable definition) and on whole columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from lib.feature_representation import Feature, Origin

if TYPE_CHECKING:
    from lib.tasks.arithmetic_task import Problem

Columns = Mapping[str, np.ndarray]
Native = Callable[[Columns], np.ndarray]

RANGE_EDGES = range(0, 300, 25)
QUOTIENT_EDGES = range(0, 30, 3)
_MAX_DIGITS = 18
"""Whole operands of up to this many digits fit into int64."""


# ---------------------------------------------------------------- columns

def problem_columns(problems: Sequence[Problem | None]) -> dict[str, np.ndarray]:
    """Arrays [row] of the parsed problems.

    operator: one character ("" if the prompt is no problem); a, b: operands (NaN likewise); whole: both are whole
    numbers; abs_a, abs_b: their magnitudes as int64 (0 unless whole); digits_a, digits_b: digit counts.
    """
    texts = [("", "nan", "nan") if problem is None else (problem.operator, *problem.operands) for problem in problems]
    operator, a_text, b_text = (np.array(column, dtype=str) for column in zip(*texts, strict=True))
    columns = {"operator": operator, "a": a_text.astype(float), "b": b_text.astype(float)}
    whole = np.ones(len(texts), dtype=bool)
    for name, text in (("a", a_text), ("b", b_text)):
        digits = np.char.lstrip(text, "+-")
        is_whole = np.char.isdigit(digits) & (np.char.str_len(digits) <= _MAX_DIGITS)
        columns[f"abs_{name}"] = np.where(is_whole, digits, "0").astype(np.int64)
        columns[f"digits_{name}"] = np.where(is_whole, np.char.str_len(digits), 0)
        columns[f"set_{name}"] = _digit_sets(columns[f"abs_{name}"], columns[f"digits_{name}"])
        whole &= is_whole
    return {**columns, "whole": whole}


def _digit_sets(values: np.ndarray, n_digits: np.ndarray) -> np.ndarray:
    """Which digits occur in each number [row], as bits 0 to 9."""
    sets = np.zeros(len(values), dtype=np.int64)
    for place in range(int(n_digits.max(initial=0))):
        digit = values // 10**place % 10
        sets |= np.where(place < n_digits, 1 << digit, 0)
    return sets


# ---------------------------------------------------------------- features on columns, [row] float, NaN: not applicable

def _known(columns: Columns, values: np.ndarray) -> np.ndarray:
    """The values where the prompt is a problem."""
    return np.where(columns["operator"] != "", values, np.nan)


def _whole(columns: Columns, values: np.ndarray) -> np.ndarray:
    """The values where both operands are whole numbers."""
    return np.where(columns["whole"], values, np.nan)


def _operator_is(symbol: str) -> Native:
    return lambda columns: _known(columns, columns["operator"] == symbol)


def _divides(columns: Columns) -> np.ndarray:
    a, b = columns["abs_a"], columns["abs_b"]
    nonzero = (a > 0) & (b > 0)
    low, high = np.minimum(a, b), np.maximum(a, b)
    return _whole(columns, nonzero & (high % np.where(nonzero, low, 1) == 0))


def _column_overflow(columns: Columns, symbol: str,
                     overflows: Callable[[np.ndarray, np.ndarray, int], np.ndarray]) -> np.ndarray:
    """1 where, for some number of low digits, `overflows(a's, b's, 10**k)` holds; 0 for other operators."""
    a, b = columns["abs_a"], columns["abs_b"]
    places = int(max(columns["digits_a"].max(initial=0), columns["digits_b"].max(initial=0)))
    found = np.zeros(len(a), dtype=bool)
    for place in range(1, places + 1):
        base = 10**place
        found |= overflows(a % base, b % base, base)
    return np.where(columns["operator"] == symbol, _whole(columns, found), _known(columns, np.zeros(len(a))))


def _carry(columns: Columns) -> np.ndarray:
    return _column_overflow(columns, "+", lambda a, b, base: a + b >= base)


def _borrow(columns: Columns) -> np.ndarray:
    return _column_overflow(columns, "-", lambda a, b, base: a < b)


def _power_of_ten_denominator(columns: Columns) -> np.ndarray:
    powers = 10.0 ** np.arange(_MAX_DIGITS)
    by_division = np.where(columns["b"] > 0, np.isin(columns["b"], powers), np.nan)
    return np.where(columns["operator"] == "/", by_division, _known(columns, np.zeros(len(by_division))))


def _closeness(columns: Columns) -> np.ndarray:
    a, b = columns["a"], columns["b"]
    return _known(columns, np.abs(a - b) <= 0.1 * np.maximum(np.abs(a), np.abs(b)))


def _in_range(values: Native, low: int, high: int) -> Native:
    def native(columns: Columns) -> np.ndarray:
        numbers = values(columns)
        return np.where(np.isnan(numbers), np.nan, (numbers >= low) & (numbers <= high))

    return native


_RESULTS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "add": ("+", np.add), "sub": ("-", np.subtract), "mul": ("*", np.multiply)}


def _result(name: str) -> Native:
    symbol, operation = _RESULTS[name]
    return lambda columns: np.where(columns["operator"] == symbol, operation(columns["a"], columns["b"]), np.nan)


def _quotient(columns: Columns) -> np.ndarray:
    divides = (columns["operator"] == "/") & (columns["b"] != 0)
    return np.where(divides, np.floor(columns["a"] / np.where(divides, columns["b"], 1.0)), np.nan)


# ---------------------------------------------------------------- the catalogue

_A, _B, _OP = "info['operand_a']", "info['operand_b']", "info['operator']"


def _seed(label: str, description: str, fn_name: str, body: str, native: Native) -> Feature:
    """A seed feature; `body` is one expression or an indented block after the check that the prompt was parsed."""
    block = body if body.startswith("    ") else f"    return 1.0 if {body} else 0.0\n"
    source = f"def {fn_name}(prompt: str, info: dict):\n    if {_OP} is None:\n        return None\n{block}"
    return Feature(label, description, source, fn_name, Origin.SEED, native)


def _needs_digits(body: str) -> str:
    return f"    if info['a_int'] is None or info['b_int'] is None:\n        return None\n{body}"


_CARRY_BODY = _needs_digits(
    "    carry, found = 0, False\n"
    "    a, b = info['digits_a'][::-1], info['digits_b'][::-1]\n"
    "    for place in range(max(len(a), len(b))):\n"
    "        column = (a[place] if place < len(a) else 0) + (b[place] if place < len(b) else 0) + carry\n"
    "        carry = 1 if column >= 10 else 0\n"
    "        found = found or carry == 1\n"
    "    return 1.0 if found else 0.0\n")
_BORROW_BODY = _needs_digits(
    "    borrow, found = 0, False\n"
    "    a, b = info['digits_a'][::-1], info['digits_b'][::-1]\n"
    "    for place in range(max(len(a), len(b))):\n"
    "        column = (a[place] if place < len(a) else 0) - (b[place] if place < len(b) else 0) - borrow\n"
    "        borrow = 1 if column < 0 else 0\n"
    "        found = found or borrow == 1\n"
    "    return 1.0 if found else 0.0\n")


def _only_for(symbol: str, body: str) -> str:
    return f"    if {_OP} != '{symbol}':\n        return 0.0\n{body}"


def _base_features() -> list[Feature]:
    whole = _needs_digits
    flag = "    return 1.0 if {} else 0.0\n".format
    names = {"Addition": "+", "Subtraction": "-", "Multiplication": "*", "Division": "/"}
    operators = [_seed(f"Operator: {name}", f"1 if the operator is {symbol}", f"operator_{name.lower()}",
                       f"{_OP} == '{symbol}'", _operator_is(symbol)) for name, symbol in names.items()]
    return [
        _seed("Operands equal", "1 if both operands are the same number", "operands_equal", f"{_A} == {_B}",
              lambda c: _known(c, c["a"] == c["b"])),
        *operators,
        _seed("Same digit count", "1 if both operands have as many digits", "same_digit_count",
              whole(flag("info['len_a'] == info['len_b']")), lambda c: _whole(c, c["digits_a"] == c["digits_b"])),
        _seed("Left has more digits", "1 if the first operand has more digits", "left_has_more_digits",
              whole(flag("info['len_a'] > info['len_b']")), lambda c: _whole(c, c["digits_a"] > c["digits_b"])),
        _seed("Right has more digits", "1 if the second operand has more digits", "right_has_more_digits",
              whole(flag("info['len_a'] < info['len_b']")), lambda c: _whole(c, c["digits_a"] < c["digits_b"])),
        _seed("Divides evenly (any order)", "1 if one operand divides the other; 0 if either is 0", "divides_evenly",
              whole("    a, b = abs(info['a_int']), abs(info['b_int'])\n    if a == 0 or b == 0:\n        return 0.0\n"
                    "    return 1.0 if max(a, b) % min(a, b) == 0 else 0.0\n"), _divides),
        _seed("GCD > 1", "1 if the operands' greatest common divisor exceeds 1", "gcd_above_one",
              whole(flag("math.gcd(info['a_int'], info['b_int']) > 1")),
              lambda c: _whole(c, np.gcd(c["abs_a"], c["abs_b"]) > 1)),
        _seed("Carry in addition", "1 if adding the operands column by column carries; 0 for other operators",
              "carry_in_addition", _only_for("+", _CARRY_BODY), _carry),
        _seed("Borrow in subtraction", "1 if subtracting the second operand column by column borrows (always when it "
              "is the larger one); 0 for other operators", "borrow_in_subtraction", _only_for("-", _BORROW_BODY),
              _borrow),
        _seed("Division denominator is power of 10", "1 if the divisor is 1, 10, 100, ...; 0 for other operators, not "
              "applicable if it is not positive", "denominator_is_power_of_10",
              _only_for("/", f"    if {_B} <= 0:\n        return None\n"
                             f"    return 1.0 if {_B} in [10.0 ** k for k in range({_MAX_DIGITS})] else 0.0\n"),
              _power_of_ten_denominator),
        _seed("Operands share a digit", "1 if a digit occurs in both operands", "operands_share_a_digit",
              whole(flag("set(info['digits_a']) & set(info['digits_b'])")),
              lambda c: _whole(c, (c["set_a"] & c["set_b"]) != 0)),
        _seed("Relative closeness ≤ 10%", "1 if the operands differ by at most a tenth of the larger magnitude",
              "relative_closeness", f"abs({_A} - {_B}) <= 0.1 * max(abs({_A}), abs({_B}))", _closeness),
        _seed("Same sign", "1 if both operands have the same sign", "same_sign", "info['sign_a'] == info['sign_b']",
              lambda c: _known(c, np.signbit(c["a"]) == np.signbit(c["b"]))),
    ]


def _range_feature(label: str, description: str, fn_name: str, value: str, low: int, high: int, native: Native,
                   guard: str = "") -> Feature:
    body = f"{guard}    return 1.0 if {low} <= {value} <= {high} else 0.0\n"
    return _seed(label, f"{description} is between {low} and {high}", fn_name, body, _in_range(native, low, high))


def _range_features() -> list[Feature]:
    bins = [(low, low + RANGE_EDGES.step) for low in RANGE_EDGES]
    features = []
    for name, (symbol, _) in _RESULTS.items():
        guard = f"    if {_OP} != '{symbol}':\n        return None\n"
        features += [_range_feature(f"Result in [{low},{high}] ({name})", f"1 if a{symbol}b",
                                    f"result_{name}_{low}_{high}", f"{_A} {symbol} {_B}", low, high, _result(name),
                                    guard) for low, high in bins]
    for label, name, value in (("op1", "a", _A), ("op2", "b", _B)):
        features += [_range_feature(f"{label} in [{low},{high}]", f"1 if operand {label[-1]}", f"{label}_{low}_{high}",
                                    value, low, high, itemgetter(name)) for low, high in bins]
    guard = f"    if {_OP} != '/' or {_B} == 0:\n        return None\n"
    features += [_range_feature(f"Division: q_int in [{low},{low + QUOTIENT_EDGES.step}]", "1 if a/b rounded down",
                                f"quotient_{low}_{low + QUOTIENT_EDGES.step}", f"math.floor({_A} / {_B})", low,
                                low + QUOTIENT_EDGES.step, _quotient, guard) for low in QUOTIENT_EDGES]
    return features


def seed_features() -> list[Feature]:
    """All seed features, in catalogue order."""
    return [*_base_features(), *_range_features()]
