"""`anchored_rules.md`: a run of stage 7 for people. Best rules with held-out scores, one prompt each, the controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.artifacts import atomic_write
from lib.flip_metrics import QualityCut
from lib.flip_table import FlipTable
from lib.flip_targets import FlipTarget

PAGE_NAME = "anchored_rules.md"
MAX_SHOWN = 10
MAX_TEXT = 80
_EFFECT = {
    FlipTarget.ANY: "change its label",
    FlipTarget.C2I: "lose the behaviour",
    FlipTarget.I2C: "show the behaviour",
}


@dataclass(frozen=True)
class RunFacts:
    """What the page says beside the rules. controls, joint: as measured, empty or None where a run has none."""

    table: FlipTable
    policy: str
    cut: QualityCut
    controls: Mapping[str, Any]
    joint: Mapping[str, Any] | None


def write_page(stats_dir: Path, anchored: pd.DataFrame, facts: RunFacts) -> Path:
    """Write the page of the best rules (`lib.flip_report.anchored_rules`)."""
    with atomic_write(stats_dir / PAGE_NAME) as handle:
        handle.write(page(anchored, facts))
    return stats_dir / PAGE_NAME


def page(anchored: pd.DataFrame, facts: RunFacts) -> str:
    """The whole page; parts that a run has no figures for are left out."""
    best = anchored.head(MAX_SHOWN)
    parts = [["# Neuron-anchored rules", "", *_measured(facts)]]
    if len(best):
        parts.append([f"## The best {len(best)} of {len(anchored)} rules", "", *_rules(best, facts.cut)])
    else:
        parts.append(["No neuron flips enough prompts for a rule that could be scored on TEST."])
    examples = list(_examples(best))
    if examples:
        title = "## One held-out prompt each, before and after ablation"
        parts.append([title, "", *_table(("neuron", "prompt", "answer before", "answer after"), examples)])
    if facts.joint is not None:
        parts.append(["## All neurons at once", "", *_joint(facts.joint)])
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _measured(facts: RunFacts) -> Iterator[str]:
    """What was ablated on what, and what the controls show."""
    table = facts.table
    roles = ", ".join(f"{count:,} {role}" for role, count in table.rows.counts().items() if count)
    yield (
        f"{len(table.neurons)} neurons, each ablated alone on {len(table.rows):,} prompts ({roles}); "
        f"run `{facts.policy}`."
    )
    no_op, floor = facts.controls.get("no_op"), facts.controls.get("random_neurons") or {}
    if no_op:
        yield f"An edit that changes nothing flips {no_op['n_flips']} labels."
    if "flip_any_rate" in floor:
        yield (
            f"{floor['n_neurons']} random neurons of the same components flip {_percent(floor['flip_any_rate'])} of "
            f"the prompts on average, {_percent(floor['max_flip_any_rate'])} at most."
        )


def _rules(best: pd.DataFrame, cut: QualityCut) -> Iterator[str]:
    yield (
        "Each rule was chosen on TRAIN, frozen, and scored once on TEST, among the prompts on which its kind of flip "
        "can happen; brackets are 95 % bootstrap intervals. *flips*: of how many of these prompts. *gain*: MCC above "
        "that of the rule that knows only the label before ablation. *q*: chance, corrected for the number of neurons."
    )
    yield (
        f"*high* quality: {cut.metric} >= {cut.threshold:.2f} on at least {_percent(cut.min_coverage)} of the prompts; "
        f"the *badge* also asks for a lower bound of MCC >= {cut.badge_lower_bound:.2f}, q <= {cut.badge_q:.2f} and "
        "gain > 0."
    )
    yield ""
    scores = ("flips", "MCC", "precision", "recall", "covers", "gain", "q", "quality")
    header = ("neuron", "ablation makes the model", "when", *scores)
    yield from _table(header, [_rule_cells(row) for _, row in best.iterrows()])


def _rule_cells(row: pd.Series) -> list[str]:
    return [
        row["neuron"],
        _EFFECT[FlipTarget(row["kind"])],
        code(row["rule"], limit=None),
        f"{int(row['n_pos']):,} of {int(row['n_eval']):,}",
        _interval(row, "MCC", "MCC"),
        _interval(row, "Precision", "Precision"),
        _interval(row, "TPR", "Recall"),
        _percent(row["dataset_coverage"]),
        _number(row["MCC_gain"]),
        _number(row["q_value"], ".2g"),
        "badge" if row["badge"] else "high" if row["high_quality"] else "",
    ]


def _examples(best: pd.DataFrame) -> Iterator[list[str]]:
    """Cells of the rules that have an example."""
    for _, row in best.iterrows():
        if isinstance(row.get("prompt"), str):
            yield [row["neuron"], *(code(row[name]) for name in ("prompt", "answer_before", "answer_after"))]


def _joint(joint: Mapping[str, Any]) -> Iterator[str]:
    """Both directions on held-out rows, the neurons beside random ones."""
    test, n_neurons = joint["test"], joint["n_neurons"]
    sides = (("positive", "lost"), ("negative", "gained"))
    yield "Share of the TEST prompts whose label changes when all are ablated together."
    yield ""
    header = [f"behaviour {change}, of {test[f'n_baseline_{side}']:,} baseline-{side}" for side, change in sides]
    random = [list(test[f"share_{side}_{change}_random"]) for side, change in sides]
    rows = [[f"the {n_neurons} neurons", *(_percent(test[f"share_{side}_{change}"]) for side, change in sides)]]
    if random[0]:
        name = f"{n_neurons} random neurons of the same components, mean (range) of {len(random[0])} draws"
        rows.append([name, *(_spread(shares) for shares in random)])
    yield from _table(("ablated", *header), rows)


def _spread(shares: Sequence[float]) -> str:
    return f"{_percent(float(np.mean(shares)))} ({_percent(min(shares))} to {_percent(max(shares))})"


# ---------------------------------------------------------------- cells


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    for cells in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(cells)} |"


def code(text: object, limit: int | None = MAX_TEXT) -> str:
    """Text as Markdown code inside a table cell, the table's own signs escaped; of a long text its end is shown."""
    shown = " ".join(str(text).split())
    if limit is not None and len(shown) > limit:
        shown = f"... {shown[-limit:].lstrip()}"
    shown = shown.replace("|", "\\|").replace("`", "'")
    return f"`{shown}`" if shown else "(empty)"


def _interval(row: pd.Series, score: str, interval: str) -> str:
    return f"{_number(row[score])} [{_number(row[f'{interval}_low95'])}, {_number(row[f'{interval}_high95'])}]"


def _number(value: float, form: str = ".2f") -> str:
    return "-" if pd.isna(value) else format(float(value), form)


def _percent(value: float | None) -> str:
    return "-" if value is None or pd.isna(value) else f"{100 * value:.1f} %"
