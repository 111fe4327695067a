"""Stage 3: rules of a behaviour, chosen on TRAIN, scored once on TEST, with controls and a summary for people."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lib.artifacts import StageRecord, atomic_write, exclusive, read_json, write_csv, write_json
from lib.cli import Report, UserError, derived_seed, rng
from lib.rule_baselines import Baseline, fit_baseline
from lib.rule_controls import FakeTarget, PermutationNull, Stability, fake_target, permutation_null, stability
from lib.rule_files import LabelledRows, selected_indices, write_rules
from lib.rule_induction import Sample, distinct_rows
from lib.rule_metrics import bootstrap_interval, rule_scores
from lib.rule_report import TargetFindings, summary_markdown
from lib.scores_table import ScoresTable, load_scores, sanitize_label
from lib.task_spec import resolve_task_spec

if TYPE_CHECKING:
    from lib.ruleshap import RuleSHAP

_NOT_SETTINGS = {"features_scores_dir", "rules_dir", "force", "quiet"}
_FAKE = "_fake"


def extract_rules(args: argparse.Namespace, report: Report) -> None:
    """Write the rule files of every target, unless matching ones are there."""
    folder, source = Path(args.rules_dir), Path(args.features_scores_dir)
    suffix = _FAKE if args.fake_targets else ""
    settings = {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS}
    inputs = {"feature table": source / "scores.csv", "feature catalogue": source / "features.json"}
    record = StageRecord("rule_extraction", settings, inputs, folder / f"run_metadata{suffix}.json")
    if not args.force and record.is_complete():
        report.line(f"stage 3 is up to date: {folder}")
        _print_summary(record.summary(), report)
        return
    started = time.time()
    table = load_scores(source, resolve_task_spec(args.task_module, source))
    with exclusive(folder):
        written, summary = Extraction(args, table, folder, report, _descriptions(inputs["feature catalogue"])).run()
        record.finish(written, started=started, summary=summary)
    _print_summary(summary, report)


def _print_summary(summary: dict[str, Any], report: Report) -> None:
    for target, found in summary.get("targets", {}).items():
        test = "" if found["test_mcc"] is None else f", TEST MCC {found['test_mcc']:.3f}"
        if found["n_literals"]:
            report.line(f"{target}: {found['rule']}  (TRAIN MCC {found['train_mcc']:.3f}{test})")
        if found["reason"]:
            report.line(f"{target}: {'the control has ' if found['n_literals'] else ''}no rule: {found['reason']}")
    if "page" in summary:
        report.line(f"summary: {summary['page']}")


def _descriptions(path: Path) -> dict[str, str]:
    """What each feature column measures, as stage 2 recorded it."""
    return {
        item.get("column") or sanitize_label(str(item["label"])): str(item.get("description") or "")
        for item in read_json(path, "feature catalogue (stage 2)")
    }


@dataclass(frozen=True)
class Extraction:
    """One run of the stage."""

    args: argparse.Namespace
    table: ScoresTable
    folder: Path
    report: Report
    descriptions: dict[str, str]

    @cached_property
    def features(self) -> np.ndarray:
        """Feature matrix of all rows, [row, feature]."""
        return self.table.features()

    def run(self) -> tuple[list[Path], dict[str, Any]]:
        """All targets; returns the files written and the summary."""
        written: list[Path] = []
        findings, summary = [], {}
        fakes = self._fake_targets(written) if self.args.fake_targets else {}
        for name in self.report.progress(self.table.targets, unit="target", desc="rules"):
            found, paths = TargetExtraction(self, name, fakes.get(name)).run()
            findings.append(found)
            written += paths
            summary[found.target] = _target_summary(found)
        page = self.folder / f"rules_summary{_FAKE if self.args.fake_targets else ''}.md"
        title = "Rules of random targets (control)" if self.args.fake_targets else "Rules of the behaviour"
        _write_text(page, summary_markdown(title, findings, self.descriptions))
        return [*written, page], {"targets": summary, "page": page.as_posix()}

    def _fake_targets(self, written: list[Path]) -> dict[str, FakeTarget]:
        """A shuffled copy of each target, saved with the report of how it was drawn."""
        args, fakes, entries = self.args, {}, {}
        columns = {"original_idx": np.arange(len(self.table))}
        for name in self.table.targets:
            labelled = np.flatnonzero(self.table.frame[name].notna())
            real = self.table.target(name, labelled)
            fake = fake_target(
                real,
                self.table.is_test[labelled],
                rng(args.seed, "fake target", name),
                max_abs_corr=args.fake_target_max_abs_corr,
                max_tries=args.fake_target_max_tries,
            )
            if not fake.is_within_bound:
                self.report.line(
                    f"warning: after {fake.tries} draws the fake {name} still correlates {fake.correlation:.3f} "
                    "with the real one; raise --fake_target_max_tries or --fake_target_max_abs_corr"
                )
            column = np.full(len(self.table), None, dtype=object)
            column[labelled] = fake.y
            columns[name + _FAKE], fakes[name] = column, fake
            entries[name] = {
                "fake_column": name + _FAKE,
                "is_binary": True,
                "pearson_corr_true_vs_fake": fake.correlation,
                "abs_pearson_corr_true_vs_fake": abs(fake.correlation),
                "tries": fake.tries,
                "agreement_rate": float(np.mean(real == fake.y)),
                "seed": args.seed,
                "max_abs_corr_target": args.fake_target_max_abs_corr,
            }
        write_json(self.folder / "fake_targets_report.json", entries)
        write_csv(self.folder / "fake_targets.csv", pd.DataFrame(columns))
        written += [self.folder / "fake_targets_report.json", self.folder / "fake_targets.csv"]
        return fakes


@dataclass(frozen=True)
class TargetExtraction:
    """One target of the run."""

    run_of: Extraction
    real_name: str
    fake: FakeTarget | None

    @property
    def args(self) -> argparse.Namespace:
        """The run's flags."""
        return self.run_of.args

    @property
    def target(self) -> str:
        """Name of the target in files."""
        return self.real_name + (_FAKE if self.fake else "")

    @cached_property
    def labelled(self) -> np.ndarray:
        """Row numbers that have a label."""
        return np.flatnonzero(self.run_of.table.frame[self.real_name].notna())

    def rows(self, is_test: bool) -> tuple[LabelledRows, np.ndarray]:
        """The TRAIN or TEST rows and their row numbers; TRAIN rows distinct if asked for."""
        table = self.run_of.table
        chosen = table.is_test[self.labelled] == is_test
        index = self.labelled[chosen]
        y = self.fake.y[chosen] if self.fake else table.target(self.real_name, index)
        features = self.run_of.features[index]
        if self.args.only_unique_datapoints_in_rule_extraction and not is_test:
            kept = distinct_rows(features, y)
            features, y, index = features[kept], y[kept], index[kept]
        return LabelledRows(features, tuple(table.feature_names), y), index

    def fit(self, rows: LabelledRows, scope: str, *, explain: bool) -> RuleSHAP:
        """The estimator on some rows."""
        from lib.ruleshap import RuleSHAP

        args = self.args
        model = RuleSHAP(
            max_conditions=args.max_conditions,
            max_literals=args.max_rules,
            use_shap_in_xgb=args.use_shap_in_xgb,
            use_shap_in_lasso=args.use_shap_in_lasso,
            n_splits=args.inner_folds,
            n_repeats=args.inner_repeats,
            alpha=args.rule_alpha,
            unique_rows_in_shap=args.only_unique_datapoints_in_shap,
            fast_shap=args.fast_shap_estimate,
            explain=explain,
            require_rule=self.fake is not None,
            random_state=derived_seed(args.seed, "stage3", self.target, scope),
        )
        return model.fit(rows.features, rows.y, feature_names=rows.names)

    def run(self) -> tuple[TargetFindings, list[Path]]:
        """Fit, control, score and write."""
        args, folder = self.args, self.run_of.folder
        train, train_index = self.rows(is_test=False)
        test, _ = self.rows(is_test=True)
        test = test if len(test) else None
        if not len(train):
            raise UserError(
                f"{self.run_of.table.path} has no TRAIN row with a {self.real_name} label; run stage 2 again"
            )
        model = self.fit(train, "train", explain=True)
        whole = None
        if test is not None and not args.no_emit_all_fit_rules:
            whole = self.fit(train.followed_by(test), "all_fit", explain=False)
        null, stable = self._controls(model, train)
        written = self._explanation_files(model, train, null)
        # TEST rows are looked at from here on only, when nothing is left to choose.
        comparison = self._compare(model, train, test) if args.baselines else None
        if comparison is not None:
            written += self._baseline_files(comparison)
        self._remove_stale()
        written += write_rules(
            folder,
            self.target,
            model,
            train,
            test=test,
            all_fit_model=whole,
            with_test_selected=args.emit_test_selected,
            seed=derived_seed(args.seed, self.target),
        )
        frame = self.run_of.table.frame
        answers = (
            frame[self.run_of.table.output_col] if self.run_of.table.output_col in frame else pd.Series("", frame.index)
        )
        checked = model.validation_
        return TargetFindings(
            self.target,
            model.rule_,
            model.reason_,
            train,
            test,
            frame[self.run_of.table.prompt_col].iloc[train_index].tolist(),
            answers.iloc[train_index].tolist(),
            float(checked.chosen_scores.mcc) if checked else float("nan"),
            checked.p_value if checked else float("nan"),
            null,
            stable,
            comparison,
            whole.rule_ if whole else None,
            args.seed,
            self._notes(model),
        ), written

    def _notes(self, model: RuleSHAP) -> list[str]:
        notes = []
        if self.fake is not None:
            notes.append(
                f"a control on a shuffled target (correlation {self.fake.correlation:.3f} with the real one). Its "
                "rule is the best-looking one, whether or not it is better than chance."
            )
            if model.reason_:
                notes.append(f"{model.reason_}.")
        return notes

    def _controls(self, model: RuleSHAP, train: LabelledRows) -> tuple[PermutationNull | None, Stability | None]:
        args, settings = self.args, model.induction_settings()
        sample = Sample.of(train.features, train.y, train.names)
        if sample.is_constant:
            return None, None
        seed = derived_seed(args.seed, "stage3 controls", self.target)
        progress = self.run_of.report.progress
        null = stable = None
        if args.npermutations:
            cost = sum(len(literal.conditions) + literal.negated for literal in model.rule_.literals)
            draws = progress(range(args.npermutations), unit="shuffle", desc=f"null of {self.target}")
            null = permutation_null(sample, settings, cost, draws, seed)
        if args.stability_resamples and model.rule_.literals:
            draws = progress(range(args.stability_resamples), unit="resample", desc=f"stability of {self.target}")
            stable = stability(sample, settings, model.rule_, draws, seed)
        return null, stable

    def _explanation_files(self, model: RuleSHAP, train: LabelledRows, null: PermutationNull | None) -> list[Path]:
        """SHAP statistics, SHAP figures and the scatter of the candidates."""
        if model.explanation_ is None:
            return []
        from lib.rule_plots import plot_candidates, plot_shap

        explained, folder = model.explanation_, self.run_of.folder
        plots = folder / "shap_plots"
        frame = pd.DataFrame({"feature": train.names, **explained.statistics(), "weight": explained.weights})
        if null is not None:
            frame["permutation_p_value"] = null.importance_p_values
        frame = frame.sort_values(["upper_importance_bound", "feature"], ascending=[False, True])
        path = folder / f"shap_statistics_{self.target}.csv"
        write_csv(path, frame)
        written = [path]
        if null is not None:
            written.append(folder / f"permutation_null_{self.target}.csv")
            write_csv(
                written[-1],
                pd.DataFrame(
                    {"draw": ["real", *range(len(null.scores))], "best_MCC": [null.observed_score, *null.scores]}
                ),
            )
        written += plot_shap(
            plots,
            self.target,
            explained.values,
            train.features[explained.rows],
            train.names,
            explained.upper_importance_bound,
        )
        chosen = selected_indices(model.rule_, model.rules_)
        return written + plot_candidates(plots, self.target, model.rules_, chosen, float(train.y.mean()))

    def _compare(self, model: RuleSHAP, train: LabelledRows, test: LabelledRows | None) -> pd.DataFrame:
        """RuleSHAP and the baselines on the same split, one row per learner and scope."""
        fitted: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int, int]]
        fitted = {"ruleshap": (model.fires, model.rule_.n_literals, model.rule_.n_conditions)}
        for baseline in self.run_of.report.progress(
            self.args.baselines, unit="baseline", desc=f"others on {self.target}"
        ):
            other = fit_baseline(Baseline(baseline), train, derived_seed(self.args.seed, "stage3", self.target))
            fitted[baseline] = (other.predict, other.n_rules, other.n_conditions)
        rows = []
        for method, (predict, n_rules, n_conditions) in fitted.items():
            for scope, part in (("train", train), ("test", test)):
                if part is not None:
                    rows.append(
                        {
                            "method": method,
                            "scope": scope,
                            **self._comparison_row(predict(part.features), part),
                            "n_rules": n_rules,
                            "n_conditions": n_conditions,
                        }
                    )
        return pd.DataFrame(rows)

    def _comparison_row(self, fires: np.ndarray, rows: LabelledRows) -> dict[str, float]:
        scores = rule_scores(fires, rows.y)
        low, high = bootstrap_interval(fires, rows.y, "mcc", rng(self.args.seed, "baselines", self.target))
        return {
            "MCC": float(scores.mcc),
            "MCC_low95": low,
            "MCC_high95": high,
            **{name: float(getattr(scores, name)) for name in ("precision", "recall", "f1", "coverage", "accuracy")},
        }

    def _baseline_files(self, comparison: pd.DataFrame) -> list[Path]:
        from lib.rule_plots import plot_baselines

        path = self.run_of.folder / f"baselines_{self.target}.csv"
        write_csv(path, comparison)
        return [path, *plot_baselines(self.run_of.folder / "shap_plots", self.target, comparison)]

    def _remove_stale(self) -> None:
        """Delete this target's rule files of another run: what is not written anew must not pass for this run's."""
        for prefix in ("association_rules", "rule_combo", "optimal_rule_set"):
            for infix in ("", "train_", "test_selected_", "all_fit_"):
                (self.run_of.folder / f"{prefix}_{infix}{self.target}.csv").unlink(missing_ok=True)


def _target_summary(found: TargetFindings) -> dict[str, Any]:
    """What the terminal and the pipeline's summary show."""
    test = None
    if found.test is not None and found.rule.literals:
        test = float(rule_scores(found.rule.covers(found.test.columns), found.test.y).mcc)
    return {
        "rule": found.rule.display(found.train.columns),
        "n_literals": found.rule.n_literals,
        "reason": found.reason,
        "train_mcc": float(rule_scores(found.rule.covers(found.train.columns), found.train.y).mcc),
        "test_mcc": test,
    }


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as handle:
        handle.write(text)
