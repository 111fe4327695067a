"""A made-up tree of results in the published layout, with numbers known beforehand; standard library only.

Three tasks, three models, five run modes, and a few sensitivity runs. Flips are drawn per neuron and row and every
file follows from them, so that a test can count from `Cell` what a table should say. Some cells are legitimately empty
(a control that found nothing), some are broken in one way each: see `STATES`.
"""

from __future__ import annotations

import csv
import json
import pickle
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

TASKS = ("arithmetic", "bon_jailbreaking", "hans_nli")
MODELS = ("Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2-7B-Instruct", "EleutherAI/gpt-j-6B")
MODES = ("spectral_plan", "random_plan", "spectral_split", "fake_targets", "brute_force")
SCOPES = ("test", "test_selected", "all_fit")
SIGNATURE = "rule_combo_metrics_from_raw_v1"
N_ROWS, N_CORRECT, N_TEST, N_LAYERS, N_IDS = 60, 40, 20, 4, 16

# (task, model, mode) -> what is unusual there; everything else is complete.
STATES = {
    ("arithmetic", MODELS[2], "fake_targets"): "empty",
    ("hans_nli", MODELS[0], "fake_targets"): "empty",
    ("bon_jailbreaking", MODELS[2], "spectral_plan"): "truncated_coverage",
    ("arithmetic", MODELS[2], "brute_force"): "truncated_buckets",
    ("hans_nli", MODELS[1], "random_plan"): "stale_manifest",
    ("bon_jailbreaking", MODELS[0], "spectral_split"): "missing_rules",
    ("hans_nli", MODELS[2], "brute_force"): "missing_run",
}
BROKEN = {cell for cell, state in STATES.items() if state != "empty"}

_FLAGS = {  # mode: (circuit stem, bag, is_fake)
    "spectral_plan": ("rule_split-spectral_sample", "agonist_neurons-fast-spectral_anchor", False),
    "random_plan": ("rule_split-spectral_sample", "agonist_neurons-fast-random_anchor", False),
    "spectral_split": ("spectral_split", "agonist_neurons-fast-random_anchor", False),
    "fake_targets": ("rule_split-spectral_sample", "agonist_neurons-fast-spectral_anchor", True),
    "brute_force": ("rule_split-spectral_sample", "agonist_neurons-spectral_anchor", False),
}
RULE_COLUMNS = (
    "rule_target_dir",
    "layer_key",
    "neuron_id",
    "neuron_key",
    "flip_target",
    "computed_on",
    "score_scope",
    "Precision",
    "F1",
    "MCC",
    "TPR",
    "TNR",
    "BalancedAcc",
    "dataset_coverage",
    "expression",
    "rule_combo_path",
    "source_filename",
)


@dataclass
class Cell:
    """One run and what is in its files.

    flips: neuron -> rows that it flips. rules: rows of the rule tables, as written. effects: regime -> neuron ->
    max_effect. circuits: regime -> one dict per circuit: `circuit_id`, `n_groups`, `units` (candidates), `agonists`.
    """

    task: str
    llm: str
    mode: str
    circuit_label: str
    bag_label: str
    is_fake: bool
    state: str = "ok"
    flips: dict[str, set[int]] = field(default_factory=dict)
    rules: list[dict] = field(default_factory=list)
    effects: dict[str, dict[str, float]] = field(default_factory=dict)
    circuits: dict[str, list[dict]] = field(default_factory=dict)

    @property
    def run_name(self) -> str:
        return f"{self.circuit_label}-{self.bag_label}" + ("-fake_targets" if self.is_fake else "")

    @property
    def model_dir(self) -> str:
        return f"{self.task}/{self.llm}"

    @property
    def stats_dir(self) -> str:
        return f"{self.model_dir}/rule_extraction_results/neuron_flip_rules/stats/{self.run_name}"

    @property
    def circuit_dir(self) -> str:
        kind = "neural_circuit_discovery_results" + ("_fake_targets" if self.is_fake else "")
        return f"{self.model_dir}/{kind}/eap_ig_inputs/{self.circuit_label}"

    def union(self, direction: str) -> int:
        """Rows flipped by some neuron: `c2i`, `i2c` or `any`."""
        return len(set().union(*(rows_of(rows, direction) for rows in self.flips.values())) if self.flips else set())

    def best(self, scope: str, floor: float = 0.005) -> dict[str, float]:
        """Highest MCC of each neuron in a scope, by hand."""
        best: dict[str, float] = {}
        for row in self.rules:
            if row["score_scope"] == scope and row["dataset_coverage"] >= floor:
                best[row["neuron_key"]] = max(best.get(row["neuron_key"], -1.0), row["MCC"])
        return best


@dataclass
class PublishedTree:
    """The tree on disk and what was put there, by (task, model, mode)."""

    root: Path
    cells: dict[tuple[str, str, str], Cell]
    sensitivity: list[Cell]

    @property
    def data(self) -> Path:
        return self.root / "data"

    def stats(self, cell: Cell) -> Path:
        return self.data / cell.stats_dir

    def zip(self) -> None:
        """Replace data/ and cache/ by data.zip and cache.zip, as they are downloaded."""
        for name in ("data", "cache"):
            shutil.make_archive(str(self.root / name), "zip", self.root, name)
            shutil.rmtree(self.root / name)


def rows_of(rows: set[int], direction: str) -> set[int]:
    """Of the flipped rows, those of a direction: the first N_CORRECT rows were right before ablation."""
    return {row for row in rows if direction == "any" or (row < N_CORRECT) == (direction == "c2i")}


def build(
    root: Path, *, tasks=TASKS, models=MODELS, modes=MODES, states=None, sensitivity: bool = True, scores: bool = True
) -> PublishedTree:
    """Write the tree below `root`; `states` replaces STATES."""
    states = STATES if states is None else states
    cells = {
        (task, llm, mode): make_cell(task, llm, mode, states.get((task, llm, mode), "ok"))
        for task in tasks
        for llm in models
        for mode in modes
    }
    extra = []
    for task in (name for name in tasks if sensitivity and name != "hans_nli"):
        for size, rate in (("25000", ""), ("80000", ""), ("", "0.3"), ("", "0.4"), ("", "0.5")):
            extra.append(make_cell(task, models[0], "spectral_plan", "ok", size=size, rate=rate))
    tree = PublishedTree(Path(root), cells, extra)
    for task in tasks:
        for llm in models:
            _write_model(tree.root, task, llm)
    for cell in [*cells.values(), *extra]:
        if cell.state != "missing_run":
            _write_stats(tree.data / cell.stats_dir, cell, scores)
            _write_circuits(tree.data / cell.circuit_dir, cell)
    return tree


def make_cell(task: str, llm: str, mode: str, state: str, size: str = "", rate: str = "") -> Cell:
    """Draw a cell's numbers; equal arguments give equal numbers."""
    stem, bag, is_fake = _FLAGS[mode]
    label = stem + (f"-M{size}" if size else "") + ("" if task == "hans_nli" else "-decode_only")
    cell = Cell(task, llm, mode, label, bag + (f"-tau{rate}" if rate else ""), is_fake, state)
    draw = random.Random(f"{task}|{llm}|{mode}|{size}|{rate}")
    n_neurons = 0 if state == "empty" else draw.randint(2, 4) if is_fake else draw.randint(6, 12)
    units = [f"m{layer}:{index}" for layer in range(N_LAYERS) for index in range(N_IDS)]
    for neuron in sorted(draw.sample(units, n_neurons)):
        cell.flips[neuron] = set(draw.sample(range(N_ROWS), draw.randint(3, 30)))
        cell.rules += _rules_of(neuron, draw, is_fake)
    for regime in ("positive", "negative"):
        cell.effects[regime] = {
            neuron: round(draw.uniform(0.1, 1.0), 3) for neuron in cell.flips if draw.random() < 0.8
        }
    if mode == "brute_force":
        # Brute force and the search see the same model: it finds most of what the search found, and more.
        twin = make_cell(task, llm, "spectral_plan", "ok")
        for regime, effects in cell.effects.items():
            effects |= {neuron: value for neuron, value in twin.effects[regime].items() if draw.random() < 0.8}
    for regime, effects in cell.effects.items():
        cell.circuits[regime] = _circuits(draw, mode, units, task, effects)
    return cell


def _rules_of(neuron: str, draw: random.Random, is_fake: bool) -> list[dict]:
    """Rule rows of a neuron: up to two targets, each in every scope; about one in six neurons has no rule."""
    if draw.random() < 1 / 6:
        return []
    label, _, index = neuron.partition(":")
    rows = []
    for target in draw.sample(["flip", "flip_c2i", "flip_i2c"], draw.randint(1, 2)):
        column = f"{target}_{label}_{index}"
        covers = 0.001 if draw.random() < 0.1 else round(draw.uniform(0.01, 0.6), 4)
        base = draw.uniform(0.0, 0.7 if is_fake else 1.0)
        for scope, gain in (("train", 0.1), ("test", 0.0), ("test_selected", 0.03), ("all_fit", 0.08)):
            middle = "" if scope == "test" else f"{scope}_"
            name = f"rule_combo_{middle}{column}.csv"
            mcc = round(min(1.0, base + gain), 4)
            rows.append(
                {
                    "rule_target_dir": "is_correct_mean_positional",
                    "layer_key": label,
                    "neuron_id": int(index),
                    "neuron_key": f"{label}_{index}",
                    "flip_target": column,
                    "computed_on": scope,
                    "score_scope": scope,
                    "Precision": round(draw.random(), 4),
                    "F1": round(draw.random(), 4),
                    "MCC": mcc,
                    "TPR": round(draw.random(), 4),
                    "TNR": round(draw.random(), 4),
                    "BalancedAcc": round((1 + mcc) / 2, 4),
                    "dataset_coverage": covers,
                    "expression": "x0 > 0.5",
                    "rule_combo_path": f"is_correct_mean_positional/{label}_{index}/{name}",
                    "source_filename": name,
                }
            )
    return rows


def _circuits(draw: random.Random, mode: str, units: list[str], task: str, effects: dict[str, float]) -> list[dict]:
    """One circuit for brute force, up to three for the search, each with its group tests.

    Every agonist has one home circuit, whose groups hold it as a single with its effect; circuit 0 has all units.
    """
    n_circuits = 1 if mode == "brute_force" else 3 if task == "arithmetic" else 1
    homes: dict[int, list[str]] = {number: [] for number in range(n_circuits)}
    for neuron in effects:
        homes[draw.randrange(n_circuits)].append(neuron)
    circuits = []
    for number, members in homes.items():
        candidates = units if number == 0 else sorted({*draw.sample(units, 24), *members})
        if mode == "brute_force":
            groups = [([unit], effects.get(unit, 0.05)) for unit in candidates]
        else:
            roots = [[unit for unit in candidates if unit.startswith(f"m{layer}:")] for layer in range(N_LAYERS)]
            others = [unit for unit in candidates if unit not in effects][: draw.randint(1, 6)]
            groups = [(root, 0.9) for root in roots if root]
            groups += [([unit], effects[unit]) for unit in members] + [([unit], 0.05) for unit in others]
        circuits.append(
            {"circuit_id": number, "n_groups": len(groups), "units": candidates, "groups": groups, "agonists": members}
        )
    return circuits


# ---------------------------------------------------------------- files of a model


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def _write_csv(path: Path, columns, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def accuracy_of(task: str, llm: str) -> float:
    """The behaviour's rate that the tree states for a task and model."""
    return random.Random(f"{task}|{llm}|accuracy").randint(200, 900) / 1000


def _write_model(root: Path, task: str, llm: str) -> None:
    report = root / "data" / task / llm / "feature_report"
    target = "is_jailbroken" if task == "bon_jailbreaking" else "is_correct"
    rows = [
        {"prompt": f"p{row}", "output": "o", "x0": row % 2, target: row < N_CORRECT, "is_test": row >= N_ROWS - N_TEST}
        for row in range(N_ROWS)
    ]
    _write_csv(report / "scores.csv", list(rows[0]), rows)
    _write_json(report / "features.json", [{"label": "x0", "description": "odd", "column": "x0"}])
    rate = accuracy_of(task, llm)
    key = "jailbreak_rate" if task == "bon_jailbreaking" else "accuracy"
    _write_json(report / "dataset_stats.json", {"n_examples": N_ROWS, key: rate})
    answers = root / "cache" / task / llm / "llm_io_data.pkl"
    answers.parent.mkdir(parents=True, exist_ok=True)
    answers.write_bytes(pickle.dumps([{"prompt": "p0", "output": "o"}], protocol=4))


# ---------------------------------------------------------------- stage 7


def _write_stats(folder: Path, cell: Cell, scores: bool) -> None:
    _write_json(
        folder / "rule_combo_metrics_manifest.json",
        {
            "signature": "rule_combo_metrics_v0" if cell.state == "stale_manifest" else SIGNATURE,
            "n_raw_rule_combo_files": len(cell.rules),
            "stats_dirname": cell.run_name,
            "score_scopes_written": list(SCOPES),
        },
    )
    if cell.state != "missing_rules":
        _write_rules(folder, cell)
    _write_flip_stats(folder, cell)
    _write_json(folder / "high_quality_neuron_flip_coverage.json", _coverage(cell))
    _write_json(folder / "high_quality_neuron_flip_coverage_by_layer.json", _layers(cell))
    if scores:
        _write_scores(folder / "scores.csv", cell)
    if cell.state == "truncated_coverage":
        path = folder / "high_quality_neuron_flip_coverage.json"
        path.write_text(path.read_text()[:40])


def _write_rules(folder: Path, cell: Cell) -> None:
    _write_csv(folder / "rule_combo_metrics_all_scopes.csv", RULE_COLUMNS, cell.rules)
    for scope in SCOPES:
        rows = [row for row in cell.rules if row["score_scope"] == scope]
        best = cell.best(scope, 0.0)
        top = [next(row for row in rows if row["neuron_key"] == key and row["MCC"] == mcc) for key, mcc in best.items()]
        for suffix, content in (("all", rows), ("best_per_neuron", top), ("top_50", top)):
            names = [f"rule_combo_metrics_{scope}_{suffix}.csv"]
            for name in names + [f"rule_combo_metrics_{suffix}.csv"] * (scope == "test"):
                _write_csv(folder / name, RULE_COLUMNS, content)
        values = sorted(cell.best(scope).values())
        summary = {
            "score_scope": scope,
            "n_neurons_with_rules": len(values),
            "quality_metric_label": "MCC",
            "quality_threshold": 0.7,
            "n_neurons_quality_ge_threshold": sum(v >= 0.7 for v in values),
        }
        for name in [f"rule_metrics_summary_{scope}.json"] + ["rule_metrics_summary.json"] * (scope == "test"):
            _write_json(folder / name, summary)


def _write_flip_stats(folder: Path, cell: Cell) -> None:
    rows, totals = [], {}
    for neuron, flipped in cell.flips.items():
        label, _, index = neuron.partition(":")
        row = {"layer_label": label, "layer_key": label, "neuron_id": int(index), "neuron": neuron, "n_eval": N_ROWS}
        for direction, name in (("c2i", "c2i"), ("i2c", "i2c"), ("any", "flip_any")):
            row[f"{name}_count"] = len(rows_of(flipped, direction))
            row[f"{name}_rate"] = row[f"{name}_count"] / N_ROWS
        rows.append(row)
    columns = [
        "layer_label",
        "layer_key",
        "neuron_id",
        "neuron",
        "n_eval",
        *(f"{name}_{kind}" for kind in ("count", "rate") for name in ("c2i", "i2c", "flip_any")),
    ]
    _write_csv(folder / "flip_stats_by_neuron.csv", columns, rows)
    for direction, name in (("c2i", "c2i"), ("i2c", "i2c"), ("any", "flip_any")):
        totals[f"sum_{name}_counts_over_neurons"] = sum(len(rows_of(f, direction)) for f in cell.flips.values())
        totals[f"union_{name}_unique_count"] = cell.union(direction)
        totals[f"union_{name}_unique_rate"] = cell.union(direction) / N_ROWS
    # Published files hold bare NaN tokens.
    _write_json(
        folder / "flip_stats_global.json",
        {
            "n_neurons": len(cell.flips),
            "n_evaluated_rows": N_ROWS,
            **totals,
            "union_flip_empty_unique_rate": float("nan"),
        },
    )


def high_neurons(cell: Cell, scope: str) -> list[str]:
    """Neurons whose best rule reaches 0.70 in a scope."""
    return [neuron for neuron in cell.flips if cell.best(scope).get(neuron.replace(":", "_"), -1) >= 0.7]


def _union(cell: Cell, neurons, direction: str) -> int:
    return len(set().union(*(rows_of(cell.flips[neuron], direction) for neuron in neurons)))


def _coverage(cell: Cell) -> dict:
    eligible = {
        "n_eval_baseline_valid": N_ROWS,
        "n_eval_baseline_correct": N_CORRECT,
        "n_eval_baseline_incorrect": N_ROWS - N_CORRECT,
    }
    report = {
        "quality_metric_label": "MCC",
        "quality_threshold": 0.7,
        "n_neurons_total": len(cell.flips),
        "n_neurons_high_quality": len(high_neurons(cell, "test_selected")),
        "frac_neurons_high_quality": None,
        "eligible_denominators": eligible,
        "score_scopes": {},
    }
    for scope in ("test_selected", "all_fit"):  # published files have no block of the strict scope
        high = high_neurons(cell, scope)
        block = {
            "n_neurons_high_quality": len(high),
            "eligible_denominators": eligible,
            "all_rule_bearing_in_scope": {"n_eval_any": N_ROWS},
        }
        for direction in ("any", "c2i", "i2c"):
            everyone = sum(len(rows_of(rows, direction)) for rows in cell.flips.values())
            block["all_rule_bearing_in_scope"] |= {
                f"union_{direction}": cell.union(direction),
                f"sum_{direction}": everyone,
            }
            block[f"flip_{direction}"] = {
                "union_high": _union(cell, high, direction),
                "union_all_in_scope": cell.union(direction),
                "sum_high": sum(len(rows_of(cell.flips[neuron], direction)) for neuron in high),
            }
        report["score_scopes"][scope] = block
    report["flip_any"] = {"union_share_of_all": None, "union_all": cell.union("any"), "eligible_baseline_count": N_ROWS}
    return report


def _layers(cell: Cell) -> dict:
    layers = []
    for number in range(N_LAYERS):
        members = [neuron for neuron in cell.flips if neuron.startswith(f"m{number}:")]
        row = {
            "layer_key": f"m{number}",
            "layer_sort": number,
            "n_neurons_total": len(members),
            "n_rows_with_any_eval_all": N_ROWS,
        }
        for direction in ("any", "c2i", "i2c"):
            row[f"flip_{direction}_union_all"] = _union(cell, members, direction)
            for scope in ("test_selected", "all_fit"):
                high = [neuron for neuron in high_neurons(cell, scope) if neuron in members]
                row[f"n_neurons_high_quality_{scope}"] = len(high)
                row[f"n_rows_with_any_eval_high_{scope}"] = N_ROWS if high else 0
                row[f"flip_{direction}_union_high_{scope}"] = _union(cell, high, direction)
        layers.append(row)
    return {"quality_metric_label": "MCC", "quality_threshold": 0.7, "layers": layers}


def _write_scores(path: Path, cell: Cell) -> None:
    rows = []
    for number in range(N_ROWS):
        row = {"prompt": f"p{number}", "is_correct": number < N_CORRECT, "is_test": number >= N_ROWS - N_TEST}
        for neuron, flipped in cell.flips.items():
            key = neuron.replace(":", "_")
            hit = number in flipped
            row |= {
                f"flip_{key}": hit,
                f"flip_c2i_{key}": hit and number < N_CORRECT,
                f"flip_i2c_{key}": hit and number >= N_CORRECT,
            }
        rows.append(row)
    _write_csv(path, list(rows[0]), rows)


# ---------------------------------------------------------------- stages 5 and 6


def _write_circuits(folder: Path, cell: Cell) -> None:
    draw = random.Random(f"{cell.task}|{cell.llm}|{cell.circuit_label}|scores")
    entries = []
    for number in range(3 if cell.task == "arithmetic" else 1):
        scores = {
            str((f"m{layer}", index)): round(draw.uniform(-2, 2), 6)
            for layer in range(N_LAYERS)
            for index in range(N_IDS)
        }
        entries.append(
            {
                "status": "ok",
                "circuit_id": number,
                "target": "is_correct",
                "metadata_topn": {"selected_n": len(scores), "neuron_label_score": scores},
            }
        )
    _write_json(folder / "neural_circuits" / "manifest.json", entries)
    _write_json(
        folder / "neural_circuits" / "dataset_info.json",
        {
            "scores_path": f"data/{cell.model_dir}/feature_report/scores.csv",
            "ai_model": cell.llm,
            "task_module": f"lib.tasks.{cell.task}_task",
        },
    )
    for regime in ("positive", "negative"):
        _write_regime(folder / cell.bag_label / f"{regime}_baseline", cell, regime)


def _write_regime(folder: Path, cell: Cell, regime: str) -> None:
    knockout = []
    for circuit in cell.circuits[regime]:
        number = circuit["circuit_id"]
        knockout.append(
            {
                "circuit_id": number,
                "circuit_label": f"circuit {number}",
                "analysis_mode": "rule",
                "rule_target": "is_correct",
                "status": "ok",
                "baseline_subset": regime,
                "n_ablation_groups": circuit["n_groups"],
            }
        )
        _write_json(
            folder / "is_correct" / f"rule_{number:04d}.json",
            {
                **knockout[-1],
                "ablations": [
                    {
                        "layers_neurons_dict": _by_layer(units),
                        "group_size": len(units),
                        "depth": int(cell.mode != "brute_force" and len(units) == 1),
                        "max_effect": effect,
                    }
                    for units, effect in circuit["groups"]
                ],
            },
        )
    knockout.append(
        {
            "circuit_id": 99,
            "circuit_label": "circuit 99",
            "rule_target": "is_correct",
            "status": "skipped",
            "reason": "too few datapoints",
        }
    )
    _write_json(folder / "rule_knockout.json", knockout)
    homes = {neuron: circuit["circuit_id"] for circuit in cell.circuits[regime] for neuron in circuit["agonists"]}
    buckets = {
        neuron: {
            "best_abs_gap": value,
            "last_record": {"max_effect": value, "accuracy_gap": round(value / 2, 3), "circuit_id": homes[neuron]},
        }
        for neuron, value in cell.effects[regime].items()
    }
    _write_json(
        folder / "neuron_buckets.json",
        {
            "catastrophic_zero": {"candidates": {}, "confirmed": {}, "not_always": {}},
            "non_catastrophic_agonists": buckets,
        },
    )
    _write_json(folder / "neuron_bucket_stats.json", {"counts": {"non_catastrophic_agonists": len(buckets)}})
    if cell.state == "truncated_buckets":
        path = folder / "neuron_buckets.json"
        path.write_text(path.read_text()[:30])


def _by_layer(units: list[str]) -> dict[str, list[int]]:
    layers: dict[str, list[int]] = {}
    for unit in units:
        label, _, index = unit.partition(":")
        layers.setdefault(label, []).append(int(index))
    return layers
