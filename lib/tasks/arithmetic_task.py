"""Arithmetic: does the model answer `x+y=`, `x-y=`, `x*y=` and `x/y=` correctly?

Prompts. All ordered pairs of operands 0..max_operand (1..max_operand for division), per operator, first operand in the
outer loop, written `12+7=`; `--few_shot K` puts K solved examples before each (`2+3=5; 9-2=7; 12+7=`). A prompt that
equals one of the examples stays in the set.

Answers. The answer is the text up to the first `;` or line break (leading space apart), its value the first number
there: `10; 4` is 10, `The sum is 12.` is 12, `7=7` is 7. Thousands may be grouped (`1,234`). A sum, difference or
product is right if the value equals the truth, so `15.0` is 15. A quotient is right if the value equals it, or if it
agrees with it to all decimals it shows, rounded or cut off, and shows at least `--division_digits` significant digits:
with 1 digit 0.3 is right for 1/3, 0.6 and 0.7 for 2/3, but 0 never is, and 14 is wrong for 29/2. Truth is computed from
the operands. `--answer_scoring published` labels as the published runs did (below), to compare with archived data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lib.answers import first_line, first_number, has_ended, is_number, number_has_ended
from lib.cli import UserError, rng
from lib.task_spec import AnswerScore, FeatureTaskSpec, TaskSettings, setting, target_statistics

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from lib.feature_representation import Feature

OPERATORS = "+-*/"
SHOTS = (("+", "2+3=5"), ("-", "9-2=7"), ("*", "4*6=24"), ("/", "8/2=4"),
         ("+", "7+5=12"), ("-", "15-8=7"), ("*", "3*9=27"), ("/", "12/4=3"))
"""Solved examples in the order in which `--few_shot` takes them."""

_PROBLEM = re.compile(r"\s*([+\-]?\d+(?:\.\d+)?)\s*([+\-*/])\s*([+\-]?\d+(?:\.\d+)?)\s*=?\s*")
_SIGNS = str.maketrans({"×": "*", "·": "*", "∙": "*", "x": "*", "X": "*", "÷": "/", "−": "-"})
_PLAIN_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_BEGINNING = re.compile(r"(-?)(\d+)")
"""Sign and first digits of a number, up to a grouping comma or a decimal point."""
_ENDS = ";\n\r"
"""Characters that end an answer: the few-shot prefix separates problems by semicolons."""


class AnswerScoring(Enum):
    """How answers are labelled."""

    NUMERIC = "numeric"
    """First number of the answer, compared as a number (see the module's text)."""

    PUBLISHED = "published"
    """As the published runs: the answer must hold exactly one number, and truth and answer are compared as text; for a
    quotient either may be a prefix of the other, so that 0 is right for every quotient below 1."""


@dataclass(frozen=True)
class ArithmeticSettings(TaskSettings):
    """Flags of the arithmetic task; the defaults give the published 359,401 prompts."""

    max_new_tokens: int = setting(6, "greedy tokens per answer, here and in every ablation")
    max_operand: int = setting(299, "largest operand")
    operators: str = setting(OPERATORS, "operators, any of + - * /")
    few_shot: int = setting(0, f"number of solved examples before each prompt, at most {len(SHOTS)}")
    limit: int = setting(0, "number of prompts, drawn at random, as many of each operator as possible; 0: all")
    division_digits: int = setting(1, "significant digits that an inexact quotient must show to be right")
    answer_scoring: AnswerScoring = setting(AnswerScoring.NUMERIC, "numeric, or as in the published runs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.operators or set(self.operators) - set(OPERATORS) or len(set(self.operators)) < len(self.operators):
            raise UserError(f"--operators {self.operators!r}: give some of {OPERATORS}, each once, without spaces")
        if self.max_operand < 1:
            raise UserError(f"--max_operand {self.max_operand}: must be at least 1")
        available = sum(operator in self.operators for operator, _ in SHOTS)
        if not 0 <= self.few_shot <= available:
            raise UserError(f"--few_shot {self.few_shot}: from 0 to {available} with the operators {self.operators}")
        if self.limit < 0 or self.division_digits < 1:
            raise UserError("--limit must not be negative and --division_digits must be at least 1")


@dataclass(frozen=True)
class Problem:
    """`a operator b`, with exact operands; `operands` holds their text."""

    operator: str
    operands: tuple[str, str]

    @cached_property
    def values(self) -> tuple[Fraction, Fraction]:
        """Both operands as exact numbers."""
        return Fraction(self.operands[0]), Fraction(self.operands[1])

    @property
    def truth(self) -> Fraction | None:
        """The exact result; None for a division by zero."""
        a, b = self.values
        if self.operator == "+":
            return a + b
        if self.operator == "-":
            return a - b
        if self.operator == "*":
            return a * b
        return a / b if b else None

    @property
    def python_truth(self) -> float | int:
        """The result as Python prints it, which published scoring compares."""
        truth = self.truth
        if truth is None:
            raise UserError(f"{self.operands[0]}/{self.operands[1]} has no value")
        return float(truth) if self.operator == "/" or truth.denominator != 1 else int(truth)


def parse_problem(prompt: str) -> Problem | None:
    """The last problem of a prompt (after the few-shot examples), or None."""
    for separator in (";", ","):
        if separator in prompt:
            prompt = prompt.rpartition(separator)[2]
            break
    match = _PROBLEM.fullmatch(prompt.translate(_SIGNS))
    return Problem(match[2], (match[1], match[3])) if match else None


def agrees(written: str, truth: Fraction, significant_digits: int) -> bool:
    """True if a decimal number is `truth`, or shows it rounded or cut off with enough significant digits.

    A number without a decimal point claims to be exact.
    """
    value = Fraction(written)
    if value == truth:
        return True
    decimals = len(written.partition(".")[2])
    digits = written.lstrip("-").replace(".", "").lstrip("0")
    if not decimals or len(digits) < significant_digits or value * truth < 0:
        return False
    unit = Fraction(1, 10**decimals)
    return abs(value - truth) <= unit / 2 or 0 <= abs(truth) - abs(value) < unit


def single_number(text: str) -> float | int | None:
    """Published parsing: the number of a text that holds exactly one."""
    found = _PLAIN_NUMBER.findall(text)
    if len(found) != 1:
        return None
    return float(found[0]) if "." in found[0] else int(found[0])


def published_label(problem: Problem, text: str) -> bool:
    """Published comparison of an answer with the truth, as texts."""
    candidate = _to_number(text.strip())
    if candidate is None:
        candidate = single_number(text)
    if candidate is None:
        return False
    truth, answer = str(problem.python_truth), str(candidate)
    if "." in truth:
        return truth.startswith(answer) or answer.startswith(truth)
    return truth == answer


def _to_number(text: str) -> float | int | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


class ArithmeticTask(FeatureTaskSpec):
    """The four basic operations on small whole numbers."""

    NAME = "arithmetic"
    Settings = ArithmeticSettings
    TOKENS_DICT_KEYS = "operator, operand_a, operand_b, len_a, len_b, digits_a, digits_b"
    SYSTEM_PROMPT = (
        "You study why a language model gets some arithmetic prompts right and others wrong. The prompts have the "
        "forms a+b=, a-b=, a*b= and a/b= with whole numbers. Propose short, testable properties of a prompt that tell "
        "the two groups apart and say different things: the operator, sizes and ranges of operands and results, digit "
        "patterns, carries and borrows, divisibility, symmetry, special numbers.")

    settings: ArithmeticSettings

    @property
    def SEED_FEATURES(self) -> list[Feature]:  # noqa: N802 (published name)
        """86 features: 16 on operators, digits and divisibility, 70 ranges of operands and results."""
        from lib.tasks.arithmetic_features import seed_features

        return seed_features()

    # -- prompts

    @property
    def depends_on_seed(self) -> bool:
        """Only a limited set is drawn at random."""
        return self.settings.limit > 0

    @property
    def prefix(self) -> str:
        """The solved examples before each prompt."""
        shots = [shot for operator, shot in SHOTS if operator in self.settings.operators]
        return "".join(f"{shot}; " for shot in shots[: self.settings.few_shot])

    def examples(self, seed: int) -> list[dict[str, Any]]:
        """All problems, or `limit` of them, in order of operator (`+-*/`), first and second operand."""
        pools = {operator: self._problems(operator) for operator in OPERATORS if operator in self.settings.operators}
        if self.settings.limit:
            pools = self._limited(pools, seed)
        return [{"prompt": f"{self.prefix}{a}{operator}{b}=", "operator_group": operator}
                for operator, pairs in pools.items() for a, b in pairs]

    def _problems(self, operator: str) -> list[tuple[int, int]]:
        operands = range(1 if operator == "/" else 0, self.settings.max_operand + 1)
        return [(a, b) for a in operands for b in operands]

    def _limited(self, pools: dict[str, list[tuple[int, int]]], seed: int) -> dict[str, list[tuple[int, int]]]:
        """Draw `limit` problems: small pools give all they have, the others share the rest evenly."""
        remaining, chosen = self.settings.limit, {}
        by_size = sorted(pools, key=lambda operator: len(pools[operator]))
        for position, operator in enumerate(by_size):
            count = min(len(pools[operator]), remaining // (len(pools) - position))
            picks = rng(seed, "arithmetic", "limit", operator).choice(len(pools[operator]), count, replace=False)
            chosen[operator] = [pools[operator][pick] for pick in sorted(picks.tolist())]
            remaining -= count
        return {operator: chosen[operator] for operator in pools}

    # -- answers

    def score_answers(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[AnswerScore]:
        """Right, wrong, or unknown if the row's prompt is no problem of this task."""
        return [self._score(str(row["prompt"]), answer) for row, answer in zip(rows, answers, strict=True)]

    def _score(self, prompt: str, answer: str) -> AnswerScore:
        problem = parse_problem(prompt)
        if problem is None or problem.truth is None:
            return AnswerScore(None, f"not an arithmetic problem with a value: {prompt!r}")
        if self.settings.answer_scoring is AnswerScoring.PUBLISHED:
            return AnswerScore(published_label(problem, answer))
        written = first_number(first_line(answer, _ENDS))
        if written is None:
            return AnswerScore(False, "no number in the answer")
        if problem.operator == "/":
            return AnswerScore(agrees(written, problem.truth, self.settings.division_digits))
        return AnswerScore(Fraction(written) == problem.truth)

    def answer_is_complete(self, text: str) -> bool:
        """True once the first number has ended, or the answer has without one (numeric scoring only)."""
        if self.settings.answer_scoring is AnswerScoring.PUBLISHED:
            return False
        return has_ended(text, _ENDS) or number_has_ended(text.lstrip().replace("−", "-"))

    def label_is_settled(self, row: Mapping[str, Any], text: str) -> bool:
        """True once the first number has another sign or begins with other digits than the result (numeric scoring).

        A quotient may be rounded, to no more than the next whole number.
        """
        problem = parse_problem(str(row["prompt"]))
        if self.settings.answer_scoring is AnswerScoring.PUBLISHED or problem is None or problem.truth is None:
            return False
        line, truth = first_line(text, _ENDS), problem.truth
        begun = _BEGINNING.search(line)
        if begun is None or not line.isascii():
            return False
        is_negative, digits = bool(begun[1]), begun[2].lstrip("0")
        whole = (str(math.floor(abs(truth))), str(math.ceil(abs(truth))))
        return (truth != 0 and is_negative != (truth < 0)) or not any(number.startswith(digits) for number in whole)

    def cache_from_answers(self, examples: Sequence[dict[str, Any]], answers: Sequence[str]) -> dict[str, list[tuple]]:
        """`{operator: [(prompt, num_out, raw_output, is_correct, is_pure), ...]}`."""
        cache: dict[str, list[tuple]] = {}
        scores = self.score_answers(examples, answers)
        for example, answer, score in zip(examples, answers, scores, strict=True):
            item = (example["prompt"], self._value(answer), answer, bool(score.label), self._is_pure(answer))
            cache.setdefault(example["operator_group"], []).append(item)
        return cache

    def _value(self, answer: str) -> int | float | None:
        """The number that an answer gives: the first one, or in published scoring the only one."""
        if self.settings.answer_scoring is AnswerScoring.PUBLISHED:
            return single_number(answer)
        written = first_number(first_line(answer, _ENDS))
        return None if written is None else float(written) if "." in written else int(written)

    def _is_pure(self, answer: str) -> bool:
        """True if the answer is a number and nothing else."""
        if self.settings.answer_scoring is AnswerScoring.PUBLISHED:
            return _PLAIN_NUMBER.fullmatch(answer.strip()) is not None
        return is_number(first_line(answer, _ENDS))

    def dataset_from_cache(self, cache: Any) -> pd.DataFrame:
        """One row per prompt: `operator_group, prompt, num_out, raw_output, is_correct, is_pure`."""
        import pandas as pd

        if not isinstance(cache, dict) or not all(isinstance(items, list) for items in cache.values()):
            raise UserError("not a cache of arithmetic answers (operator: list of tuples); is it another task's?")
        rows = [(operator, *item[:5]) for operator, items in cache.items() for item in items
                if isinstance(item, tuple | list) and len(item) >= 5]
        columns = ["operator_group", "prompt", "num_out", "raw_output", "is_correct", "is_pure"]
        frame = pd.DataFrame(rows, columns=columns)
        if frame.empty:
            raise UserError("the cache of arithmetic answers is empty; delete it and run stage 1 again")
        frame["prompt"] = frame["prompt"].str.strip()
        frame["num_out"] = pd.to_numeric(frame["num_out"], errors="coerce").astype(float)
        frame["raw_output"] = frame["raw_output"].fillna("")
        return frame.astype({"is_correct": bool, "is_pure": bool})

    def get_basic_statistics(self, frame: pd.DataFrame) -> dict[str, Any]:
        """Accuracy, also by operator, and how often the answer is a bare number."""
        statistics = target_statistics(frame, ("is_correct", "is_pure"))
        groups = frame.groupby("operator_group")["is_correct"]
        by_operator = {name: {"n": len(labels), "accuracy": float(labels.mean())} for name, labels in sorted(groups)}
        return statistics | {
            "accuracy": float(frame["is_correct"].mean()), "n_correct": int(frame["is_correct"].sum()),
            "n_labeled": len(frame), "accuracy_by_operator": by_operator,
            "pure_number_output_rate": float(frame["is_pure"].mean())}

    # -- features

    def parse_prompt_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Operator, operands and digits; all None or empty if the prompt is no problem."""
        problem = parse_problem(str(row["prompt"]))
        operator, (a, b) = (problem.operator, problem.operands) if problem else (None, (None, None))
        return {"operator": operator, **_operand_info("a", a), **_operand_info("b", b)}

    def native_columns(self, frame: pd.DataFrame) -> Mapping[str, np.ndarray]:
        """Operators and operands of all prompts as arrays."""
        from lib.tasks.arithmetic_features import problem_columns

        return problem_columns([parse_problem(prompt) for prompt in frame["prompt"]])


def _operand_info(name: str, text: str | None) -> dict[str, Any]:
    """The `info` entries of one operand, `a` or `b`."""
    if text is None:
        return {f"operand_{name}": None, f"{name}_int": None, f"len_{name}": None, f"digits_{name}": [],
                f"sign_{name}": None}
    digits = [] if "." in text else [int(digit) for digit in text.lstrip("+-")]
    return {f"operand_{name}": float(text), f"{name}_int": int(text) if digits else None, f"len_{name}": len(digits),
            f"digits_{name}": digits, f"sign_{name}": -1 if text.startswith("-") else 1}


TASK_SPEC = ArithmeticTask()
