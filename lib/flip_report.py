"""For people: the best anchored rules with their held-out scores, and one prompt each before and after ablation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from lib.artifacts import atomic_write, without_formulas, write_csv
from lib.cli import UserError
from lib.flip_answer_log import AnswerLog, group_key
from lib.flip_metrics import QualityCut
from lib.flip_rule_tables import TEST, best_per_neuron
from lib.flip_table import FlipTable
from lib.flip_targets import FlipTarget, target_of_column
from lib.scores_table import ScoresTable
from lib.text_and_rules import parse_rule

MAX_SHOWN = 10
_DIRECTION = {FlipTarget.ANY: "flips", FlipTarget.C2I: "loses", FlipTarget.I2C: "gains"}


def anchored_rules(
    rules: pd.DataFrame, table: FlipTable, scores: ScoresTable, cut: QualityCut, answers: AnswerLog | None
) -> pd.DataFrame:
    """One row per neuron with a rule on held-out rows, best first: badge, high quality, gain, lower bound of MCC.

    answers: stored answers to the table's rows, for the examples; None for no examples.
    """
    best = best_per_neuron(rules, TEST, cut)
    if not len(best):
        return pd.DataFrame(columns=["neuron", "direction", "rule", "MCC", "MCC_low95", "MCC_high95"])
    columns = {name: scores.frame[name].to_numpy()[table.rows.rows] for name in scores.feature_names}
    places = {neuron.key: place for place, neuron in enumerate(table.neurons)}
    rows = []
    for _, rule in best.iterrows():
        place = places[rule["neuron_key"]]
        target = target_of_column(rule["flip_target"], rule["neuron_key"])
        rows.append(
            {
                "neuron": str(table.neurons[place]),
                "direction": _DIRECTION[target],
                "rule": _display(rule["expression"], columns),
                **{
                    name: rule[name]
                    for name in (
                        "MCC",
                        "MCC_low95",
                        "MCC_high95",
                        "Precision",
                        "Precision_low95",
                        "Precision_high95",
                        "TPR",
                        "F1",
                        "dataset_coverage",
                        "n_eval",
                        "n_pos",
                        "MCC_gain",
                        "q_value",
                        "high_quality",
                        "badge",
                        "flip_target",
                        "expression",
                    )
                },
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


def write_anchored_rules(stats_dir: Path, frame: pd.DataFrame) -> list[Path]:
    """`anchored_rules.csv` (all) and `anchored_rules.md` (the ten best, as a table to read)."""
    write_csv(stats_dir / "anchored_rules.csv", without_formulas(frame))
    with atomic_write(stats_dir / "anchored_rules.md") as handle:
        handle.write(anchored_markdown(frame.head(MAX_SHOWN)))
    return [stats_dir / "anchored_rules.csv", stats_dir / "anchored_rules.md"]


def anchored_markdown(frame: pd.DataFrame) -> str:
    """A Markdown table; model text is shown as code, with the table's own signs escaped."""
    lines = [
        "Rules chosen on TRAIN, scored once on TEST; intervals are 95 % bootstrap intervals of the TEST score.",
        "",
        "| neuron | ablation makes the model | when | TEST MCC | precision | recall | gain | q | badge "
        "| example: before -> after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for _, row in frame.iterrows():
        verb = {"flips": "change its verdict", "loses": "lose the behaviour", "gains": "show the behaviour"}[
            row["direction"]
        ]
        example = (
            f"{_code(row['prompt'])}: {_code(row['answer_before'])} -> {_code(row['answer_after'])}"
            if isinstance(row.get("prompt"), str)
            else ""
        )
        lines.append(
            f"| {row['neuron']} | {verb} | {_code(row['rule'])} | {_interval(row, 'MCC')} | "
            f"{_interval(row, 'Precision')} | {_number(row['TPR'])} | {_number(row['MCC_gain'])} | "
            f"{_number(row['q_value'], '.2g')} | {'yes' if row['badge'] else ''} | {example} |"
        )
    return "\n".join(lines) + "\n"


def _interval(row: pd.Series, name: str) -> str:
    return f"{_number(row[name])} [{_number(row[f'{name}_low95'])}, {_number(row[f'{name}_high95'])}]"


def _number(value: float, form: str = ".2f") -> str:
    return "-" if pd.isna(value) else format(float(value), form)


def _code(text: object) -> str:
    """Text as Markdown code inside a table cell."""
    shown = " ".join(str(text).split()).replace("|", "\\|").replace("`", "'")
    return f"`{shown}`" if shown else "(empty)"
