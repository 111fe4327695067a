"""Seed features that any prompt has, and features made of the columns of a table."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Sequence

from lib.feature_representation import Feature, Origin, per_row

MAX_CATEGORIES = 20
"""A column of words with more different values than this gives no features."""
MIN_CATEGORY_SHARE = 0.01
"""Rarer words of a column give no feature."""
INPUT_PREFIX = "input_"
"""Before the name of the user's columns in `scores.csv`; the features made of them have the bare name."""
OPENERS = ("what", "who", "when", "where", "why", "how", "which")
_YES_NO = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}


# ---------------------------------------------------------------- features of the text: source and native form are one

def prompt_characters(prompt: str, info: dict) -> float:
    """length in characters"""
    return float(len(prompt))


def prompt_words(prompt: str, info: dict) -> float:
    """number of words"""
    return float(len(prompt.split()))


def mean_word_length(prompt: str, info: dict) -> float | None:
    """characters per word; not applicable without words"""
    words = prompt.split()
    return sum(len(word) for word in words) / len(words) if words else None


def prompt_lines(prompt: str, info: dict) -> float:
    """number of lines"""
    return float(len(prompt.splitlines()))


def numbers_in_prompt(prompt: str, info: dict) -> float:
    """how many numbers it has"""
    return float(len(re.findall("[0-9]+", prompt)))


def capitalized_words(prompt: str, info: dict) -> float:
    """how many words begin with a capital letter"""
    return float(sum(1 for word in prompt.split() if word[0].isupper()))


def question_mark(prompt: str, info: dict) -> float:
    """1 if it has a question mark"""
    return 1.0 if "?" in prompt else 0.0


def quotation(prompt: str, info: dict) -> float:
    """1 if it has a double quotation mark"""
    return 1.0 if '"' in prompt else 0.0


def commas(prompt: str, info: dict) -> float:
    """how many commas it has"""
    return float(prompt.count(","))


def negation(prompt: str, info: dict) -> float:
    """1 if it has a word of negation"""
    found = re.search(r"\b(?:not|no|never|none|nothing|neither|nor|cannot|without|\w+n't)\b", prompt.lower())
    return 1.0 if found else 0.0


_TEXT = (prompt_characters, prompt_words, mean_word_length, prompt_lines, numbers_in_prompt, capitalized_words,
         question_mark, quotation, commas, negation)


def text_features() -> list[Feature]:
    """Features of the prompt's text: length, numbers, capitals, punctuation, negation, question words."""
    return [*map(_text_feature, _TEXT), *map(_opener, OPENERS)]


def _text_feature(function: Callable[[str, dict], float | None]) -> Feature:
    label = function.__name__.replace("_", " ").capitalize()
    return Feature(label, function.__doc__ or "", inspect.getsource(function), function.__name__, Origin.SEED,
                   per_row(lambda prompt: function(prompt, {}), "prompt"))


def _opener(word: str) -> Feature:
    pattern = rf"\b{word}\b"
    source = (f"def asks_{word}(prompt: str, info: dict):\n"
              f"    return 1.0 if re.search({pattern!r}, prompt.lower()) else 0.0\n")
    return Feature(f"Asks {word}", f"1 if the prompt has the word {word}", source, f"asks_{word}", Origin.SEED,
                   per_row(lambda prompt: float(re.search(pattern, prompt.lower()) is not None), "prompt"))


# ---------------------------------------------------------------- features of columns

def column_features(name: str, values: Sequence[str]) -> list[Feature]:
    """Features of one column of a table: its number, its yes/no, or one per frequent word.

    name: what the user calls it; the values are in the column `input_<name>`.
    """
    known = [value for value in values if value != ""]
    cell = f"info['columns'][{name!r}]"
    if known and all(_number(value) is not None for value in known):
        return [_column_feature(name, name, f"column {name}", f"float({cell}) if {cell} else None", _number)]
    if known and all(value.lower() in _YES_NO for value in known):
        return [_column_feature(name, name, f"1 if column {name} says yes", f"{_YES_NO!r}.get({cell}.lower())",
                                lambda value: _YES_NO.get(value.lower()))]
    counts = Counter(known)
    frequent = sorted(value for value, count in counts.items() if count >= MIN_CATEGORY_SHARE * len(values))
    if len(counts) > MAX_CATEGORIES:
        return []
    return [_column_feature(name, f"{name}: {value}", f"1 if column {name} is {value}",
                            f"1.0 if {cell} == {value!r} else 0.0", _is(value))
            for value in frequent]


def _column_feature(name: str, label: str, description: str, expression: str,
                    function: Callable[[str], float | None]) -> Feature:
    source = f"def column_value(prompt: str, info: dict):\n    return {expression}\n"
    return Feature(label, description, source, "column_value", Origin.SEED, per_row(function, f"{INPUT_PREFIX}{name}"))


def _is(value: str) -> Callable[[str], float]:
    return lambda found: float(found == value)


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
