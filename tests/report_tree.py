"""A made-up finished run with planted flips, written by the project's own writers: for the tests of the HTML report and
its benchmark. No model is involved; the search is the real one against an oracle."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.agonist_files import TestedGroup, ablation_records, layers_of, write_rule_file
from lib.artifacts import write_csv, write_json
from lib.cli import rng
from lib.flip_answer_log import AnswerLog, ChangedAnswers
from lib.flip_rows import EvaluatedRows
from lib.flip_rule_tables import MANIFEST_SIGNATURE
from lib.flip_table import FlipTable, flip_frame, global_statistics, neuron_statistics
from lib.flip_targets import FlipTarget
from lib.group_testing import SearchSettings, Slices, Verdict, search
from lib.neuron_intervention import FlipMatrix
from lib.neurons import Neuron
from lib.reporting.naming import MAIN_RUN, RunName
from lib.rule_metrics import rule_scores
from lib.search_orders import attribution_forest
from lib.text_and_rules import parse_rule
from tests.lib.planted_oracle import PlantedOracle

FEATURES = ("sum_is_large", "operands_equal")
RULE = "sum_is_large > 0.5"
DATAPOINTS = 40


@dataclass
class ReportWorld:
    """What is planted. Neuron number i flips the prompts on which its rule fires, thinned out for all but the first.

    texts: row -> prompt that replaces the usual one; answers: row -> answer after ablation that replaces it.
    """

    n_neurons: int = 6
    n_rows: int = 60
    n_candidates: int = 96
    n_layers: int = 6
    seed: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    answers: dict[int, str] = field(default_factory=dict)
    description: str = "1 if the sum has two digits"

    def __post_init__(self) -> None:
        random = rng(self.seed, "report world")
        self.d_model = -(-self.n_candidates // self.n_layers)
        chosen = np.sort(random.choice(self.n_candidates, self.n_neurons, replace=False))
        self.candidates = [Neuron(f"m{i // self.d_model}", i % self.d_model) for i in range(self.n_candidates)]
        self.neurons = tuple(self.candidates[i] for i in chosen.tolist())
        self.chosen = chosen
        row = np.arange(self.n_rows)
        self.columns = {"sum_is_large": (row % 3 == 0).astype(float), "operands_equal": (row % 7 == 0).astype(float)}
        self.baseline = row % 2 == 0
        self.is_test = row % 4 == 1
        self.is_test |= row % 8 == 0
        fires = parse_rule(RULE).covers(self.columns)
        keep = random.random((self.n_neurons, self.n_rows)) < 0.8
        keep[0] = True
        self.flips = fires & keep
        self.prompts = [self.texts.get(i, f"2+3=5; {i}+{i + 1}=") for i in range(self.n_rows)]

    def write(self, root: Path) -> Path:
        """All files of the run; the model root."""
        folder = root / "data" / "arithmetic" / "Tiny"
        name = RunName.parse(MAIN_RUN)
        base = folder / "neural_circuit_discovery_results" / "eap_ig_inputs" / name.circuit_label / name.bag_label
        self.write_features(folder / "feature_report")
        self.write_rules(folder / "rule_extraction_results")
        for regime in ("positive", "negative"):
            self.write_search(base / f"{regime}_baseline", regime)
        self.write_flips(folder / "rule_extraction_results" / "neuron_flip_rules" / "stats" / MAIN_RUN)
        return folder

    def frame(self) -> pd.DataFrame:
        """The feature table."""
        columns: dict[str, Any] = {"prompt": self.prompts, "raw_output": [str(i) for i in range(self.n_rows)]}
        columns |= {"is_correct": self.baseline, "is_pure": True, **self.columns, "is_test": self.is_test}
        return pd.DataFrame(columns)

    def write_features(self, folder: Path) -> None:
        write_csv(folder / "scores.csv", self.frame())
        catalogue = [{"label": name, "column": name, "description": self.description} for name in FEATURES]
        write_json(folder / "features.json", catalogue)
        groups = {"+": {"n": self.n_rows, "accuracy": float(self.baseline.mean())}}
        rate = float(self.baseline.mean())
        write_json(
            folder / "dataset_stats.json",
            {"n_examples": self.n_rows, "pct_is_correct": rate, "accuracy_by_operator": groups},
        )

    def write_rules(self, folder: Path) -> None:
        fires = parse_rule(RULE).covers(self.columns)
        for infix, mask in (("train_", ~self.is_test), ("", self.is_test), ("all_fit_", self.is_test | True)):
            row = {"expression": f"({RULE})", "score_scope": infix.strip("_") or "test"}
            row |= _score_columns(fires[mask], self.baseline[mask])
            write_csv(folder / f"rule_combo_{infix}is_correct.csv", pd.DataFrame([row]))
        literals = pd.DataFrame({"rule_expression": [RULE, "operands_equal <= 0.5"], "dataset_coverage": [0.33, 0.85]})
        write_csv(folder / "association_rules_is_correct.csv", literals)
        write_csv(folder / "optimal_rule_set_is_correct.csv", literals.head(1))

    # ------------------------------------------------------------ stage 6

    def write_search(self, folder: Path, regime: str) -> None:
        """A search over all candidates: agonists flip as planted, on the first datapoints as often as they should."""
        random = rng(self.seed, regime)
        flips = np.zeros((self.n_candidates, 2 * DATAPOINTS), dtype=bool)
        flips[self.chosen] = random.random((self.n_neurons, 2 * DATAPOINTS)) < 0.6
        strengths = np.where(flips.any(axis=1), 1.0, 0.1) * random.random(self.n_candidates)
        layers = np.array([neuron.layer for neuron in self.candidates])
        points = np.arange(2 * DATAPOINTS)
        slices = Slices(points[:DATAPOINTS], points[DATAPOINTS:])
        result = search(attribution_forest(strengths, layers), slices, PlantedOracle(flips), SearchSettings())
        tests = [
            TestedGroup(
                record,
                layers_of(record.members.tolist(), self.candidates),
                tuple(
                    flips[record.members][:, part[:n]].any(axis=0)
                    for part, n in zip(slices.both, record.n_evaluated, strict=True)
                ),
            )
            for record in result.records()
        ]
        records = ablation_records(tests, regime, 0.05, is_tree=True)
        entry = {
            "circuit_id": 0,
            "circuit_label": RULE,
            "rule_target": "is_correct",
            "status": "ok",
            "baseline_subset": regime,
            "n_ablation_groups": len(records),
            "search_cost": {"n_candidates": self.n_candidates, "share_of_single_tests": 0.25},
        }
        singles = [
            (str(self.candidates[int(test.record.members[0])]), record)
            for test, record in zip(tests, records, strict=True)
            if test.record.verdict is Verdict.SINGLE
        ]
        found = {name: record for name, record in singles if record["max_effect"] >= 0.2}
        detail = {"ablations": records, "audit": {"estimated_recall": 0.9, "estimated_recall_low": 0.7,
                                                  "estimated_recall_high": 1.0}}
        detail["agonists"] = [{"neuron": name, "max_effect": record["max_effect"]} for name, record in found.items()]
        write_rule_file(folder / "per_rule" / "is_correct" / "rule_0000.json", {**entry, **detail})
        skipped = {"circuit_id": 1, "circuit_label": "none", "status": "skipped", "reason": "too few datapoints"}
        write_json(folder / "rule_knockout.json", [entry, skipped])
        write_json(folder / "neuron_buckets.json", {"non_catastrophic_agonists": {
            name: {"best_abs_gap": record["max_effect"], "last_record": {
                "max_effect": record["max_effect"], "circuit_id": 0,
                "confirmed_rate": 0.6, "confirmed_low": 0.4, "confirmed_high": 0.8}}
            for name, record in found.items()}})  # fmt: skip

    # ------------------------------------------------------------ stage 7

    def table(self) -> FlipTable:
        """Flips of the neurons on all rows."""
        roles = np.where(self.is_test, "test", "train").astype(object)
        ablated = (self.baseline ^ self.flips).astype(np.int8)
        return FlipTable(
            self.neurons, EvaluatedRows(np.arange(self.n_rows), roles), FlipMatrix(self.baseline, ablated, self.flips)
        )

    def write_flips(self, folder: Path) -> None:
        table = self.table()
        write_csv(
            folder / "scores.csv", flip_frame(table, self.frame(), self.n_rows, keep_unsampled=False, sampled=True)
        )
        write_csv(folder / "flip_stats_by_neuron.csv", neuron_statistics(table))
        controls = {
            "no_op": {"n_flips": 0, "n_changed_answers": 0},
            "random_neurons": {"n_neurons": 32, "flip_any_rate": 0.004, "max_flip_any_rate": 0.02},
        }
        write_json(folder / "flip_stats_global.json", {**global_statistics(table), "controls": controls})
        log = AnswerLog(folder / "ablated_answers.jsonl", "made up", self.n_rows, load=False)
        log.start([str(i) for i in range(self.n_rows)], self.d_model)
        groups = [(neuron,) for neuron in self.neurons]
        runs = []
        for flips in self.flips:
            rows = np.flatnonzero(flips)
            runs.append(ChangedAnswers(rows, tuple(self.answers.get(int(row), f"{row + 1} after") for row in rows)))
        log.append(groups, runs)
        rules = self.rule_rows()
        for scope in ("test", "all_fit"):
            write_csv(folder / f"rule_combo_metrics_{scope}_all.csv", rules[rules["score_scope"] == scope])
        manifest = {"signature": MANIFEST_SIGNATURE, "score_scopes_written": ["test", "all_fit"]}
        write_json(folder / "rule_combo_metrics_manifest.json", manifest)

    def rule_rows(self) -> pd.DataFrame:
        """One rule per neuron and scope, scored on the scope's rows."""
        fires = parse_rule(RULE).covers(self.columns)
        rows = []
        for neuron, flips in zip(self.neurons, self.flips, strict=True):
            for scope, mask in (("test", self.is_test), ("all_fit", self.is_test | True)):
                row = {"rule_target_dir": "is_correct", "layer_key": neuron.layer_label, "neuron_id": neuron.index,
                       "neuron_key": neuron.key, "flip_target": FlipTarget.ANY.column(neuron), "score_scope": scope,
                       "expression": f"({RULE})", "chosen_on_train": True, "badge": scope == "test"}  # fmt: skip
                rows.append(row | _score_columns(fires[mask], flips[mask]))
        return pd.DataFrame(rows)


def _score_columns(fires: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    scores = rule_scores(fires, labels)
    precision, mcc = float(scores.precision), float(scores.mcc)
    return {"Precision": precision, "P(target=1|fire)": precision, "MCC": mcc, "MCC_low95": mcc - 0.1,
            "MCC_high95": min(1.0, mcc + 0.1), "TPR": float(scores.recall), "F1": float(scores.f1),
            "BalancedAcc": float(scores.balanced_accuracy), "dataset_coverage": float(scores.coverage),
            "n_eval": int(scores.n)}  # fmt: skip
