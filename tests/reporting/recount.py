"""Figures of the tables counted again from what stages 6 and 7 wrote, without any code of the reports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.reporting.conftest import read_rows

REGIMES = ("positive", "negative")
LEAST_COVERAGE = 0.005
"""Share of the rows that a rule has to cover, the tables' default."""


def fires(expression: str, row: dict[str, str]) -> bool:
    """Whether a rule holds for a row of the feature table."""
    words = expression.replace("(", " ").replace(")", " ").split()
    values = {"FALSE": False, "TRUE": True} | {name: _number(row[name]) for name in words if name in row}
    for written, meant in ((" OR ", " or "), ("&", " and "), ("NOT(", "not (")):
        expression = expression.replace(written, meant)
    return bool(eval(expression, {"__builtins__": {}}, values))


def _number(text: str) -> float:
    return {"True": 1.0, "False": 0.0}[text] if text in ("True", "False") else float(text)


def correlation(pairs: list[tuple[bool, bool]]) -> float:
    """MCC of (rule holds, neuron flips) pairs, by its definition."""
    tp, fp, fn, tn = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / below if below else 0.0


def quality(stats: Path, scope: str) -> dict[str, float]:
    """MCC of each neuron's rule in a scope, from the rule's text and the flips of the run."""
    rows = read_rows(stats / "scores.csv")
    found: dict[str, float] = {}
    for rule in read_rows(stats / "rule_combo_metrics_all_scopes.csv"):
        if rule["score_scope"] != scope or (scope == "test" and rule["chosen_on_train"] != "True"):
            continue
        kind = rule["flip_target"].removeprefix("flip_").split("_")[0]
        eligible = {"c2i": {"True"}, "i2c": {"False"}}.get(kind, {"True", "False"})
        used = [row for row in rows if row["is_correct"] in eligible and (scope != "test" or row["is_test"] == "True")]
        pairs = [(fires(rule["expression"], row), row[rule["flip_target"]] == "True") for row in used]
        assert len(pairs) == int(float(rule["n_eval"]))
        assert float(rule["MCC"]) == pytest.approx(correlation(pairs), abs=1e-9)
        if sum(holds for holds, _ in pairs) < LEAST_COVERAGE * len(pairs):
            continue
        found[rule["neuron_key"]] = max(found.get(rule["neuron_key"], -1.0), correlation(pairs))
    return found


def n_high(stats: Path, scope: str, threshold: float = 0.7) -> int:
    """Neurons whose rule reaches the threshold."""
    return sum(value >= threshold for value in quality(stats, scope).values())


def flips(stats: Path, direction: str, keys: list[str] | None = None) -> tuple[int, int]:
    """(rows that some neuron flips, rows on which that is possible)."""
    rows = read_rows(stats / "scores.csv")
    known = [name[len("flip_c2i_") :] for name in rows[0] if name.startswith("flip_c2i_")]
    wanted = [f"flip_{direction}_{key}" for key in (known if keys is None else keys)]
    eligible = {"c2i": "True", "i2c": "False"}[direction]
    hit = sum(any(row[name] == "True" for name in wanted) for row in rows)
    return hit, sum(row["is_correct"] == eligible for row in rows)


def searched(detail: dict) -> int:
    """Group tests of the search, without those of its audit."""
    return sum(not record.get("audit", False) for record in detail["ablations"])


# ---------------------------------------------------------------- a whole grid of finished runs


class FinishedRuns:
    """The runs below a repository's `data/`, found by the names that the tables give them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.n_compared = 0

    def stats(self, task: str, llm: str, run: str) -> Path:
        """Stage 7's folder of a run."""
        (found,) = (self.root / "data" / task / llm).glob(f"rule_extraction_results*/neuron_flip_rules*/stats/{run}")
        return found

    def details(self, task: str, llm: str, run: str, regime: str) -> list[dict]:
        """Stage 6's files of the circuits that a run searched in a regime."""
        kind = "neural_circuit_discovery_results" + "_fake_targets" * run.endswith("-fake_targets")
        bags = (self.root / "data" / task / llm / kind).glob("*/*/agonist_neurons*")
        name = run.removesuffix("-fake_targets")
        (bag,) = (bag for bag in bags if f"{bag.parent.name}-{bag.name}" == name)
        found = [json.loads(path.read_text()) for path in sorted(bag.glob(f"{regime}_baseline/per_rule/*/rule_*.json"))]
        return [detail for detail in found if detail["status"] == "ok"]

    def equal(self, shown: str, counted: float) -> None:
        """A figure of a table is what was counted."""
        assert float(shown) == pytest.approx(counted, abs=1e-9)
        self.n_compared += 1

    def budget(self, details: list[dict]) -> tuple[int, int, int]:
        """(group tests of the search, tests of the audit, candidates) over circuits."""
        tests = sum(searched(detail) for detail in details)
        candidates = sum(detail["search_cost"]["n_candidates"] for detail in details)
        return tests, sum(len(detail["ablations"]) for detail in details) - tests, candidates

    def check_tables(self, folder: Path) -> None:
        """Tables 1, 2, 3, 9 and 12."""
        for row in read_rows(folder / "table1_main_high_quality_neurons.csv"):
            stats = self.stats(row["Task"].lower(), row["llm"], row["run_name"])
            found = [d for regime in REGIMES for d in self.details("arithmetic", row["llm"], row["run_name"], regime)]
            self.equal(row["# Loc."], len({a["neuron"] for detail in found for a in detail["agonists"]}))
            self.equal(row["HQ(TEST)"], n_high(stats, "test"))
            self.equal(row["HQ(ALL-FIT)"], n_high(stats, "all_fit"))
            for direction, column in (("c2i", "∪(1→0) (elig. %)"), ("i2c", "∪(0→1) (elig. %)")):
                hit, eligible = flips(stats, direction)
                self.equal(row[column], 100 * hit / eligible)
        for row in read_rows(folder / "table2_threshold_sweep_per_run_long.csv"):
            if row["scope_available"] == "True":
                stats = self.stats(row["task"], row["llm"], row["run_name"])
                self.equal(row["n_rule_bearing_neurons"], len(quality(stats, row["score_scope"])))
                found = n_high(stats, row["score_scope"], float(row["threshold"]))
                self.equal(row["n_high_quality_neurons"], found)
        for row in read_rows(folder / "table3_compact_bf_vs_cha.csv"):
            if row["Model"] != "All" and row["Baseline"] != "both":
                self._check_against_brute_force(row)
        for row in read_rows(folder / "table9_baseline_performance.csv"):
            scores = read_rows(self.root / "data/arithmetic" / row["llm"] / "feature_report/scores.csv")
            self.equal(row["rate"], sum(score["is_correct"] == "True" for score in scores) / len(scores))
        for row in read_rows(folder / "table12_cha_ablation_budget.csv"):
            regime = {"pos": "positive", "neg": "negative"}[row["Baseline"]]
            tests, audit, candidates = self.budget(self.details("arithmetic", row["llm"], row["run_name"], regime))
            self.equal(row["Total"], tests)
            self.equal(row["Audit"], audit)
            if candidates:
                self.equal(row["% of N"], 100 * tests / candidates)

    def _check_against_brute_force(self, row: dict[str, str]) -> None:
        """One regime of one model in Table 3, which has a brute-force run and the main one."""
        llm = row["Model"]
        names = {path.name for path in self.root.glob(f"data/arithmetic/{llm}/rule_extraction_results/*/stats/*")}
        (brute,) = (name for name in names if name.endswith("agonist_neurons-spectral_anchor"))
        found = self.details("arithmetic", llm, brute, row["Baseline"])
        if not found:
            assert (row["N"], row["CHA ablations"], row["Overall"]) == ("", "0", "0/0")
            return
        (alone,) = found
        main = brute.removesuffix("-spectral_anchor") + "-fast-spectral_anchor"
        group_tests = self.details("arithmetic", llm, main, row["Baseline"])[alone["circuit_id"]]
        theirs = {a["neuron"] for a in alone["agonists"] if a["max_effect"] >= 0.2}
        both = theirs & {a["neuron"] for a in group_tests["agonists"]}
        assert row["Overall"].startswith(f"{len(both)}/{len(theirs)} ")
        self.equal(row["N"], alone["search_cost"]["n_candidates"])
        self.equal(row["BF ablations"], 2 * alone["search_cost"]["n_candidates"] - 1)
        self.equal(row["CHA ablations"], searched(group_tests))

    def check_sensitivity(self, path: Path, llm: str) -> None:
        """Stage 11's summary of a model."""
        for row in read_rows(path):
            stats = self.stats("arithmetic", llm, row["run_name"])
            self.equal(row["n_quality_ge_0.70"], n_high(stats, row["score_scope"]))
            found = [d for regime in REGIMES for d in self.details("arithmetic", llm, row["run_name"], regime)]
            if found:
                self.equal(row["cha_budget_total"], self.budget(found)[0])
                shares = [100 * searched(detail) / detail["search_cost"]["n_candidates"] for detail in found]
                self.equal(row["cha_budget_pct_of_N_max"], max(shares))

    def check_models(self, path: Path) -> None:
        """Stage 9's runs by model."""
        for row in read_rows(path):
            task, _, llm = row["model_root"].partition("/")
            stats = self.stats(task, llm, row["run_name"])
            self.equal(row["n_neurons_with_rules"], len(quality(stats, "test")))
            found = self.details(task, llm, row["run_name"], "positive")
            if found:
                self.equal(row["n_ablation_groups_total"], self.budget(found)[0])
                self.equal(row["n_tau_agonists"], len({a["neuron"] for d in found for a in d["agonists"]}))
