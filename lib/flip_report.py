"""The anchored rules of a run, best first: held-out scores, and one prompt each before and after ablation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lib.cli import UserError
from lib.flip_answer_log import AnswerLog, group_key
from lib.flip_metrics import QualityCut
from lib.flip_rule_tables import INTERVAL_COLUMNS, TEST, best_per_neuron
from lib.flip_table import FlipTable
from lib.flip_targets import FlipTarget, target_of_column
from lib.scores_table import ScoresTable
from lib.text_and_rules import parse_rule

_COLUMNS = (
    "MCC",
    "Precision",
    "TPR",
    "F1",
    "BalancedAcc",
    "dataset_coverage",
    *INTERVAL_COLUMNS,
    "n_eval",
    "n_pos",
    "n_fire",
    "tp",
    "baseline_rule",
    "MCC_gain",
    "p_value",
    "q_value",
    "high_quality",
    "badge",
    "flip_target",
    "target_rows",
    "expression",
)
_DIRECTION = {FlipTarget.ANY: "flips", FlipTarget.C2I: "loses", FlipTarget.I2C: "gains"}


def anchored_rules(
    rules: pd.DataFrame, table: FlipTable, scores: ScoresTable, cut: QualityCut, answers: AnswerLog | None
) -> pd.DataFrame:
    """One row per neuron with a rule on held-out rows, best first: badge, high quality, gain, lower bound of MCC.

    answers: stored answers to the table's rows, for the examples; None for no examples.
    """
    best = best_per_neuron(rules, TEST, cut)
    if not len(best):
        return pd.DataFrame(columns=["neuron", "kind", "direction", "rule", *_COLUMNS])
    columns = {name: scores.frame[name].to_numpy()[table.rows.rows] for name in scores.feature_names}
    places = {neuron.key: place for place, neuron in enumerate(table.neurons)}
    rows = []
    for _, rule in best.iterrows():
        place = places[rule["neuron_key"]]
        target = target_of_column(rule["flip_target"], rule["neuron_key"])
        rows.append(
            {
                "neuron": str(table.neurons[place]),
                "kind": target.value,
                "direction": _DIRECTION[target],
                "rule": _display(rule["expression"], columns),
                **{name: rule[name] for name in _COLUMNS},
                **_example(rule["expression"], place, target, table, scores, columns, answers),
            }
        )
    frame = pd.DataFrame(rows).assign(gains=lambda table: table["MCC_gain"] > 0)
    order = ["badge", "high_quality", "gains", "MCC_low95", "MCC"]
    return (
        frame.sort_values(order, ascending=False, kind="stable", na_position="last")
        .drop(columns="gains")
        .reset_index(drop=True)
    )


def _display(expression: str, columns: Mapping[str, np.ndarray]) -> str:
    """The rule with short thresholds; as written if it names features that are no longer there."""
    try:
        return parse_rule(expression).display(columns)
    except UserError:
        return expression


def _example(
    expression: str,
    place: int,
    target: FlipTarget,
    table: FlipTable,
    scores: ScoresTable,
    columns: Mapping[str, np.ndarray],
    answers: AnswerLog | None,
) -> dict[str, object]:
    """The first held-out prompt on which the rule fires and the neuron flips, with the answers before and after."""
    if answers is None or answers.baseline is None:
        return {}
    fires = parse_rule(expression).covers(columns)
    hits = np.flatnonzero(fires & table.flips(target)[place] & table.rows.is_test)
    if not len(hits):
        return {}
    row = int(hits[0])
    run = answers.runs[group_key([table.neurons[place]])]
    after = run.answers[int(np.searchsorted(run.rows, row))]
    return {
        "original_idx": int(table.rows.rows[row]),
        "prompt": scores.prompts[table.rows.rows[row]],
        "answer_before": answers.baseline[row],
        "answer_after": after,
    }
