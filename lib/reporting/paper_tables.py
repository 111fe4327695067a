"""The paper's tables: which there are, what they share, and how they are made one after the other."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lib.artifacts import atomic_write, write_json
from lib.cli import Report, UserError
from lib.reporting.artifacts import ModelRoot, Reading, RunFolder, find_model_roots, open_tree
from lib.reporting.experiments import choose_variant, runs_by_mode
from lib.reporting.naming import RunMode, row_order, sensitivity_parts, task_label
from lib.reporting.rules import load_best_rows
from lib.reporting.scopes import Scope, parse_scopes
from lib.reporting.session import Session, nothing_found
from lib.reporting.tables import Table

if TYPE_CHECKING:
    import pandas as pd

TABLE_NAMES = tuple(f"table{number}" for number in (1, 2, 3, 9, 10, 11, 12, 13))
DEFAULT_MODEL = "Qwen/Qwen2-7B-Instruct"
HANS = "hans_nli"
UNSUPPORTED_NOTE = """\
Tables 4 to 8 of the paper are not made here: they are glossaries (of features and tasks) or examples picked by hand
from the anchored rules of single neurons (anchored_rules.csv and anchored_rules.md of each run).
"""


@dataclass
class PaperContext:
    """What all tables share: the runs, the options, and the session that keeps inputs and issues."""

    args: argparse.Namespace
    session: Session
    roots: list[ModelRoot]
    variant: str
    scopes: tuple[Scope, ...]
    best_rows: dict[tuple[Path, Scope], Reading] = field(default_factory=dict)

    @property
    def main_roots(self) -> list[ModelRoot]:
        """Models of Tables 1 to 3 and 12, in row order: without HANS unless it is asked for."""
        return [root for root in self.roots if self.args.include_hans_in_main_tables or root.task != HANS]

    def run_of(self, root: ModelRoot, mode: RunMode) -> RunFolder:
        """A model's run of a mode; one that does not exist if there is none, which reading then finds missing."""
        found = runs_by_mode(root, self.variant).get(mode)
        return found or root.run(expected_run(mode, self.variant))

    def best(self, run: RunFolder, scope: Scope) -> Reading[pd.DataFrame]:
        """Best rule row of each neuron in a scope; read once."""
        key = (run.path, scope)
        if key not in self.best_rows:
            reading = load_best_rows(run, scope, self.args.min_rule_dataset_coverage)
            self.best_rows[key] = self.session.take(run, reading, f"rule rows ({scope.slug})")
        return self.best_rows[key]

    def root_for(self, task: str, model: str | None, what: str) -> ModelRoot:
        """The model of a table about one model: the one asked for, else the paper's, else the first that has a run.

        Raises:
            UserError: the one asked for is not there.
        """
        roots = [root for root in self.roots if root.task == task]
        named = [root for root in roots if (model or DEFAULT_MODEL) in (root.llm, root.model)]
        if not named and model:
            raise UserError(
                f"{what}: no finished run of {model} on {task}; there are {', '.join(root.unit for root in self.roots)}"
            )
        chosen = named or roots
        if not chosen:
            organisation, name = DEFAULT_MODEL.split("/")
            return ModelRoot(task, organisation, name, Path(task) / "none")
        return chosen[0]

    def write(self, table: Table) -> None:
        """Write a table in its three forms."""
        self.session.written += table.write(self.session.out_dir)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        with atomic_write(self.session.out_dir / name) as handle:
            handle.write(text)
        self.session.written.append(self.session.out_dir / name)

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file."""
        write_json(self.session.out_dir / name, value)
        self.session.written.append(self.session.out_dir / name)


def expected_run(mode: RunMode, variant: str) -> str:
    """The name that a mode's run of a variant would have."""
    parts, choices = sensitivity_parts(variant), mode.run_name.choices
    rate = choices.min_flip_rate if parts.min_flip_rate is None else f"{parts.min_flip_rate:g}"
    return replace(choices, circuit_size=parts.circuit_size or choices.circuit_size, min_flip_rate=rate).run_name


def chosen_tables(text: str) -> list[str]:
    """Table names from a comma list; `all_supported` means all.

    Raises:
        UserError: a name is unknown.
    """
    words = [word for word in re.split(r"[\s,]+", text.lower()) if word]
    words = ["table" + word.removeprefix("table") if word != "all_supported" else word for word in words]
    unknown = [word for word in words if word not in (*TABLE_NAMES, "all_supported")]
    if unknown or not words:
        raise UserError(
            f"--which {text!r} names no table that can be made; choose from all_supported, {', '.join(TABLE_NAMES)}"
        )
    return [name for name in TABLE_NAMES if name in words or "all_supported" in words]


def make_tables(args: argparse.Namespace, report: Report) -> None:
    """Make every table that is asked for.

    Raises:
        UserError: no run is found, an option makes no sense, or there are issues and `--strict` is set.
    """
    names, scopes = chosen_tables(args.which), parse_scopes(args.score_scopes)
    out_dir = Path(args.out_dir)
    if args.notes_only:
        PaperContext(args, Session(out_dir, report), [], "", scopes).write_text(
            "unsupported_tables_note.txt", UNSUPPORTED_NOTE
        )
        return
    with open_tree(args.data_root) as folder:
        roots = _filtered(find_model_roots(folder), args)
        if not roots:
            raise nothing_found(args.data_root, "finished runs (stats/<run>)")
        roots.sort(key=lambda root: row_order(root.task, root.llm))
        context = PaperContext(
            args, Session(out_dir, report, [folder]), roots, choose_variant(roots, args.variant, report), scopes
        )
        makers = _makers()
        rows = {f"{name}_rows": makers[name](context) for name in names}
        context.write_text("unsupported_tables_note.txt", UNSUPPORTED_NOTE)
        context.write_json("paper_tables_manifest.json", rows)
        context.session.finish("make_paper_tables.py", args)


def _filtered(roots: list[ModelRoot], args: argparse.Namespace) -> list[ModelRoot]:
    tasks, models = (set(re.split(r"[\s,]+", text)) - {""} for text in (args.tasks, args.models))
    return [
        root for root in roots if (not tasks or root.task in tasks) and (not models or {root.llm, root.model} & models)
    ]


def _makers() -> dict[str, Callable[[PaperContext], int]]:
    """Each table's maker, which returns its number of rows. Imported here: they import this module's context."""
    from lib.reporting import paper_tables_layers, paper_tables_rules, paper_tables_search

    return {
        "table1": paper_tables_rules.table_1, "table2": paper_tables_rules.table_2,
        "table3": paper_tables_search.table_3, "table9": paper_tables_rules.table_9,
        "table10": paper_tables_layers.table_10, "table11": paper_tables_layers.table_11,
        "table12": paper_tables_search.table_12, "table13": paper_tables_search.table_13,
    }  # fmt: skip


def main_tables_note(context: PaperContext) -> str:
    """For captions: which tasks are in the table."""
    return f"Tasks: {', '.join(dict.fromkeys(task_label(root.task) for root in context.main_roots))}."


def whole(values: list) -> pd.Series:
    """Counts with room for missing ones."""
    import pandas as pd

    return pd.array([pd.NA if pd.isna(value) else int(value) for value in values], dtype="Int64")


def read_candidate_json(path: Path) -> dict:
    """A JSON object, or {} if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
