"""The rules of the behaviour: the chosen one of each label with its scores, and the literals it was chosen from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lib.cli import UserError
from lib.reporting.artifacts import read_table
from lib.reporting.page.grids import (
    Cell,
    Column,
    Grid,
    Kind,
    count_cell,
    number_cell,
    score_cell,
    share_cell,
    small_cell,
)
from lib.reporting.page.inputs import PageInputs
from lib.reporting.page.texts import to_float, visible
from lib.text_and_rules import SCOPE_INFIXES, find_rule_files, parse_rule, rule_file_path

if TYPE_CHECKING:
    import numpy as np

_MAX_LITERALS = 2000
# Scope of a combination file, by the infix before the target; the file without one is the strict TEST score.
_COMBINATIONS = (("", "TEST"), ("train_", "TRAIN"), ("all_fit_", "ALL-FIT"))
_SCOPE_NOTE = {
    "TEST": "chosen on TRAIN, scored once on held-out prompts",
    "TRAIN": "chosen and scored on TRAIN",
    "ALL-FIT": "chosen and scored on all prompts: descriptive",
}
_LITERAL_NUMBERS = (
    ("precision", "P(ŷ_model=coefficient_sign | fire)", "share of the covered prompts that have the label"),
    ("recall", "R(fire | ŷ_model=coefficient_sign)", "share of the prompts with the label that the rule covers"),
    ("lift", "Lift(ŷ_model=coefficient_sign | fire)", "precision over the label's rate"),
    ("MCC", "MCC(ŷ_rule vs ŷ_model)", "Matthews correlation of rule and label, TRAIN"),
)


@dataclass(frozen=True)
class RulesSection:
    """chosen: the combination of each label and scope. literals: candidates on TRAIN, selected ones marked."""

    chosen: Grid | None
    literals: Grid | None
    headline: str
    n_left_out: int


def rules_section(inputs: PageInputs) -> RulesSection:
    """The second section; of a control run, the rules of the shuffled labels."""
    is_fake = bool(inputs.run and inputs.run.name and inputs.run.name.is_fake)
    targets = [name for name in _targets(inputs) if name.endswith("_fake") == is_fake]
    columns = _feature_columns(inputs)
    chosen = [row for target in targets for row in _chosen_rows(inputs, target, columns)]
    literals = [row for target in targets for row in _literal_rows(inputs, target, columns)]
    if not targets:
        inputs.note("rule_extraction_results/optimal_rule_set_*.csv", "missing", "stage 3 has not finished")
    return RulesSection(
        _chosen_grid(chosen) if chosen else None,
        _literal_grid(literals[:_MAX_LITERALS]) if literals else None,
        next((str(row[2]) for row in chosen if str(row[1]).startswith("TEST")), ""),
        max(0, len(literals) - _MAX_LITERALS),
    )


def _targets(inputs: PageInputs) -> list[str]:
    """Labels with a rule file of TRAIN; the other scopes' infixes are no part of a label."""
    infixes = tuple(infix for infix in SCOPE_INFIXES.values() if infix)
    names = [name for name, _ in find_rule_files(inputs.rules_dir)]
    return [name for name in names if not name.startswith(infixes)]


def _feature_columns(inputs: PageInputs) -> Mapping[str, np.ndarray]:
    """Every feature [prompt], so that thresholds are shown as short as they can be."""
    if inputs.scores is None:
        return {}
    return {name: inputs.scores.frame[name].to_numpy() for name in inputs.scores.feature_names}


def shown_rule(expression: object, columns: Mapping[str, Any]) -> str:
    """A stored rule for people: short thresholds where the features are known, as written where it cannot be read."""
    try:
        rule = parse_rule(str(expression))
    except UserError:
        return visible(expression, 800)
    try:
        return visible(rule.display(columns or None), 800)
    except UserError:
        return visible(rule.display(), 800)


def _chosen_rows(inputs: PageInputs, target: str, columns: Mapping[str, Any]) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for infix, scope in _COMBINATIONS:
        path = inputs.rules_dir / f"rule_combo_{infix}{target}.csv"
        table = read_table(path, dtype={"expression": str}, keep_default_na=False)
        if table.value is None or table.value.empty:
            continue
        row = table.value.iloc[0].to_dict()
        # Without held-out prompts stage 3 writes TRAIN's scores under the name of TEST, and says so.
        if scope == "TEST" and str(row.get("score_scope", "test")).startswith("train"):
            continue
        empty = str(row.get("expression", "FALSE")) in ("", "FALSE")
        rows.append(
            [
                visible(target, 60),
                f"{scope}: {_SCOPE_NOTE[scope]}",
                "no rule better than chance" if empty else shown_rule(row["expression"], columns),
                score_cell(row, "MCC"),
                score_cell(row, "P(target=1|fire)"),
                share_cell(row, "TPR"),
                share_cell(row, "dataset_coverage"),
                number_cell(to_float(row.get("Lift(target=1|fire)"))),
                count_cell(to_float(row.get("n_eval"))),
            ]
        )
    return rows


def _chosen_grid(rows: list[list[Cell]]) -> Grid:
    columns = [
        Column("label"),
        Column("scope"),
        Column("rule", Kind.MODEL, "a disjunction of conjunctions of feature thresholds"),
        Column("MCC", Kind.RATE, "Matthews correlation of rule and label, 95 % bootstrap interval"),
        Column("precision", Kind.RATE, "share of the covered prompts that have the label, 95 % bootstrap interval"),
        Column("recall", Kind.NUMBER, "share of the prompts with the label that the rule covers"),
        Column("coverage", Kind.NUMBER, "share of all prompts that the rule covers"),
        Column("lift", Kind.NUMBER, "precision over the label's rate"),
        Column("prompts", Kind.NUMBER, "prompts that score the rule"),
    ]
    return Grid("rules", "The rule of each label, by the prompts that chose and scored it", columns, rows, noun="rule")


def _literal_rows(inputs: PageInputs, target: str, columns: Mapping[str, Any]) -> list[list[Cell]]:
    """Candidate literals of a label; where only the selected ones were kept (older results), those."""
    selected = _texts(inputs, target, "optimal_rule_set")
    every = read_table(rule_file_path(inputs.rules_dir, target, prefix="association_rules"))
    table = every if every.value is not None else read_table(rule_file_path(inputs.rules_dir, target))
    rows: list[list[Cell]] = []
    for row in table.value.to_dict("records") if table.value is not None else ():
        text = str(row.get("rule_expression", row.get("expression", "")))
        rows.append(
            [
                visible(target, 60),
                "yes" if text in selected else "no",
                shown_rule(text, columns),
                share_cell(row, "dataset_coverage"),
                *(number_cell(to_float(row.get(name))) for _, name, _ in _LITERAL_NUMBERS),
                small_cell(to_float(row.get("q_value"))),
                count_cell(to_float(row.get("tp"))),
                count_cell(to_float(row.get("fp"))),
            ]
        )
    # The selected ones first, each part in the file's order (best MCC first).
    return sorted(rows, key=lambda row: row[1] != "yes")


def _texts(inputs: PageInputs, target: str, prefix: str) -> set[str]:
    table = read_table(rule_file_path(inputs.rules_dir, target, prefix=prefix)).value
    name = next((name for name in ("rule_expression", "expression") if table is not None and name in table), None)
    return set(table[name].astype(str)) if name else set()


def _literal_grid(rows: list[list[Cell]]) -> Grid:
    columns = [
        Column("label"),
        Column("selected", help="whether the literal is part of the label's rule; each selected one gets a circuit"),
        Column("literal", Kind.MODEL),
        Column("coverage", Kind.NUMBER, "share of the TRAIN prompts that the literal covers"),
        *(Column(head, Kind.NUMBER, text) for head, _, text in _LITERAL_NUMBERS),
        Column("q", Kind.NUMBER, "Fisher's exact test, corrected over all candidate literals (Benjamini-Hochberg)"),
        Column("hits", Kind.NUMBER, "covered TRAIN prompts with the label"),
        Column("misses", Kind.NUMBER, "covered TRAIN prompts without the label"),
    ]
    caption = "Literals that rules are built from, scored on TRAIN"
    return Grid("literals", caption, columns, rows, noun="literal", shown=15)
