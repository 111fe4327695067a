"""The Markdown summary of stage 3: what was found, in words, with what speaks for and against it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lib.cli import rng
from lib.rule_metrics import metric_interval, rule_scores
from lib.text_and_rules import Condition, Conjunction, Rule, rounded_threshold

if TYPE_CHECKING:
    from lib.rule_controls import PermutationNull, Stability
    from lib.rule_files import LabelledRows

N_EXAMPLES = 3
MAX_PROMPT = 160


@dataclass(frozen=True)
class TargetFindings:
    """All that the summary tells about one target. prompts, answers: texts of the TRAIN rows, [row]."""

    target: str
    rule: Rule
    reason: str
    train: LabelledRows
    test: LabelledRows | None
    prompts: list[str]
    answers: list[str]
    inner_score: float
    inner_p_value: float
    null: PermutationNull | None
    stability: Stability | None
    baselines: pd.DataFrame | None
    all_fit_rule: Rule | None
    seed: int
    notes: list[str] = field(default_factory=list)


def summary_markdown(title: str, findings: list[TargetFindings], descriptions: Mapping[str, str]) -> str:
    """The whole page. descriptions: feature column -> what it measures."""
    lines = [f"# {title}", ""]
    for found in findings:
        lines += _target_section(found, descriptions)
    return "\n".join(lines).rstrip() + "\n"


def _target_section(found: TargetFindings, descriptions: Mapping[str, str]) -> list[str]:
    prevalence = _percent(found.train.y.mean()) if len(found.train) else "-"
    lines = [
        f"## `{found.target}`",
        "",
        f"{len(found.train):,} TRAIN rows, {prevalence} positive"
        + (
            f"; {len(found.test):,} TEST rows, {_percent(found.test.y.mean())} positive."
            if found.test is not None
            else "; no TEST rows."
        ),
    ]
    lines += ["", *(f"**Note:** {note}" for note in found.notes), *([""] if found.notes else [])]
    if not found.rule.literals:
        return [*lines, f"**No rule:** {found.reason}.", "", *_controls(found), *_baselines(found)]
    columns = found.train.columns
    lines += [
        f"**`{found.target}` is likely where** {in_words(found.rule, columns)}.",
        "",
        f"`{found.rule.display(columns)}`",
        "",
        *_score_table(found),
        "",
    ]
    for number, literal in enumerate(found.rule.literals, start=1):
        lines += _literal_section(found, number, literal, descriptions)
    if found.all_fit_rule is not None:
        same = "the same rule" if found.all_fit_rule == found.rule else f"`{found.all_fit_rule.display(columns)}`"
        lines += [f"Fitted on all rows (descriptive, not held out): {same}.", ""]
    return [*lines, *_controls(found), *_baselines(found)]


def _literal_section(
    found: TargetFindings, number: int, literal: Conjunction, descriptions: Mapping[str, str]
) -> list[str]:
    columns = found.train.columns
    fires = literal.covers(columns)
    scores = rule_scores(fires, found.train.y)

    def interval(metric: str, is_share: bool) -> str:
        return _with_interval(found, f"literal {number}", fires, found.train.y, metric, is_share)

    stable = (
        f"; found again in {_percent(found.stability.literals[number - 1])} of resamples" if found.stability else ""
    )
    lines = [
        f"### Rule {number}: `{literal.display(columns)}`",
        "",
        f"TRAIN: covers {int(scores.n_fire):,} rows ({_percent(float(scores.coverage))}), precision "
        f"{interval('precision', True)}, lift {interval('lift', False)}{stable}.",
        "",
    ]
    lines += [f"- `{name}`: {descriptions[name]}" for name in literal.features if descriptions.get(name)]
    covered = np.flatnonzero(fires)
    draws = rng(found.seed, "examples", found.target, number)
    shown = np.sort(draws.choice(covered, min(N_EXAMPLES, len(covered)), replace=False))
    lines += ["", "Covered, for example:", ""]
    lines += [
        f"- {_code(found.prompts[row])} answered {_code(found.answers[row])}: "
        f"{'positive' if found.train.y[row] else 'negative'}"
        for row in shown
    ]
    return [*lines, ""]


def in_words(rule: Rule, columns: Mapping[str, np.ndarray]) -> str:
    """A rule as a sentence; a feature with the values 0 and 1 only is or is not the case."""
    literals = [_literal_in_words(literal, columns) for literal in rule.literals]
    return literals[0] if len(literals) == 1 else ", or ".join(f"({literal})" for literal in literals)


def _literal_in_words(literal: Conjunction, columns: Mapping[str, np.ndarray]) -> str:
    inner = " and ".join(_condition_in_words(condition, columns[condition.feature]) for condition in literal.conditions)
    return f"it is not the case that {inner}" if literal.negated else inner


def _condition_in_words(condition: Condition, seen: np.ndarray) -> str:
    if condition.operator in (">", "<=") and 0 <= condition.threshold < 1 and np.isin(seen, (0, 1)).all():
        return f"`{condition.feature}` {'holds' if condition.operator == '>' else 'does not hold'}"
    words = {">": "is above", "<=": "is at most", "<": "is below", ">=": "is at least", "==": "is", "!=": "is not"}
    return f"`{condition.feature}` {words[condition.operator]} {rounded_threshold(condition.threshold, seen)}"


def _score_table(found: TargetFindings) -> list[str]:
    lines = ["| rows | coverage | precision | lift | recall | MCC |", "|---|---|---|---|---|---|"]
    for label, rows in (("TRAIN", found.train), ("TEST", found.test)):
        if rows is not None:
            fires = found.rule.covers(rows.columns)
            lines.append(
                f"| {label} | "
                + " | ".join(
                    _with_interval(found, label, fires, rows.y, *metric)
                    for metric in (
                        ("coverage", True),
                        ("precision", True),
                        ("lift", False),
                        ("recall", True),
                        ("mcc", False),
                    )
                )
                + " |"
            )
    lines += ["", f"In inner cross-validation on TRAIN: MCC {found.inner_score:.3f}, p = {found.inner_p_value:.2g}."]
    return lines


def _with_interval(
    found: TargetFindings, label: str, fires: np.ndarray, y: np.ndarray, metric: str, is_share: bool
) -> str:
    show = _percent if is_share else _number
    value = show(float(getattr(rule_scores(fires, y), metric)))
    low, high = metric_interval(fires, y, metric, rng(found.seed, "summary", found.target, label, metric))
    return f"{value} ({show(low)} to {show(high)})"


def _controls(found: TargetFindings) -> list[str]:
    lines = []
    if found.null is not None and len(found.null.scores):
        null = found.null
        strong = [
            name
            for name, p in zip(found.train.names, null.importance_p_values, strict=True)
            if p <= 1 / (len(null.scores) + 1)
        ]
        lines += [
            f"Shuffled target ({len(null.scores)} times, {null.n_rows:,} rows): the best rule of this size reaches "
            f"a TRAIN MCC of {null.observed_score:.3f} on the real target, at most {null.scores.max():.3f} on shuffled "
            f"ones (p = {null.score_p_value:.2g}); {len(strong)} of {len(found.train.names)} features matter more "
            "than in any shuffle.",
            "",
        ]
    if found.stability is not None:
        lines += [
            f"The rule as a whole was found again in {_percent(found.stability.rule)} of "
            f"{found.stability.n_resamples} resamples.",
            "",
        ]
    return lines


def _baselines(found: TargetFindings) -> list[str]:
    if found.baselines is None:
        return []
    lines = ["| learner | rows | MCC | precision | recall | rules | conditions |", "|---|---|---|---|---|---|---|"]
    for row in found.baselines.to_dict("records"):
        lines.append(
            f"| {row['method']} | {row['scope'].upper()} | {_number(row['MCC'])} ({_number(row['MCC_low95'])} to "
            f"{_number(row['MCC_high95'])}) | {_percent(row['precision'])} | {_percent(row['recall'])} | "
            f"{row['n_rules']} | {row['n_conditions']} |"
        )
    return [*lines, ""]


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _number(value: Any) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _code(text: str) -> str:
    """Text as inline code on one line, shortened from the left: the end of a prompt is what differs."""
    line = " ".join(str(text).split()).replace("`", "'")
    return f"`{line}`" if len(line) <= MAX_PROMPT else f"`...{line[3 - MAX_PROMPT :]}`"
