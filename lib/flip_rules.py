"""Rules about a neuron: chosen on TRAIN, frozen, scored once on TEST; ALL-FIT apart; each target with a status."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.artifacts import StageRecord, text_digest
from lib.cli import derived_seed, rng
from lib.flip_metrics import BaselineRule, choose_baseline_rule, honest_scores, mcc_of
from lib.flip_rule_tables import ALL_FIT, TEST, TRAIN
from lib.flip_targets import FlipTarget, MinimumCounts
from lib.neurons import Neuron

if TYPE_CHECKING:
    from lib.rule_files import LabelledRows
    from lib.ruleshap import RuleSHAP


@dataclass(frozen=True)
class FitSettings:
    """How rules are fitted; all of it changes the result."""

    minimum: MinimumCounts = MinimumCounts()
    targets: tuple[str, ...] = ()
    """Kinds or full column names to fit; empty for all."""
    max_conditions: int = 3
    max_literals: int = 3
    use_shap_in_xgb: bool = False
    use_shap_in_lasso: bool = False
    unique_rows_in_shap: bool = False
    emit_all_fit: bool = True
    emit_test_selected: bool = False
    n_bootstrap: int = 1000
    seed: int = 42

    def wants(self, target: FlipTarget, neuron: Neuron) -> bool:
        """Whether the target is asked for."""
        return not self.targets or target.value in self.targets or target.column(neuron) in self.targets


@dataclass(frozen=True)
class FitProblem:
    """What all neurons share. features: [row, feature]; baseline, is_fit, is_test: bool [row].

    groups: int [row], equal for variants of one prompt, or None if every row stands for itself.
    """

    features: np.ndarray
    feature_names: tuple[str, ...]
    baseline: np.ndarray
    is_fit: np.ndarray
    is_test: np.ndarray
    groups: np.ndarray | None = None

    def digest(self) -> str:
        """Fingerprint of all of it."""
        import hashlib

        total = hashlib.sha256(text_digest([self.feature_names, list(self.features.shape)]).encode())
        for array in (self.features, self.baseline, self.is_fit, self.is_test):
            total.update(np.ascontiguousarray(array).tobytes())
        if self.groups is not None:
            total.update(self.groups.astype(np.int64).tobytes())
        return total.hexdigest()


@dataclass(frozen=True)
class TargetStatus:
    """What became of one target of one neuron; a row of `neuron_target_status.csv`."""

    neuron: str
    neuron_key: str
    flip_target: str
    target_rows: str
    status: str
    reason: str
    n_train: int
    n_train_flips: int
    n_test: int
    n_test_flips: int

    @property
    def failed(self) -> bool:
        """True if fitting raised an error."""
        return self.status == "failed"


class NeuronFit:
    """Fits all targets of one neuron and writes its rule files into a folder of its own.

    flips, known: bool [row].
    """

    def __init__(
        self,
        problem: FitProblem,
        problem_digest: str,
        settings: FitSettings,
        neuron: Neuron,
        flips: np.ndarray,
        known: np.ndarray,
        folder: Path,
    ) -> None:
        self.problem, self.settings, self.neuron = problem, settings, neuron
        self.flips, self.known, self.folder = flips, known, folder
        self.record = StageRecord(
            "stage 7 rules of a neuron",
            {
                **asdict(settings),
                "neuron": str(neuron),
                "problem": problem_digest,
                "flips": text_digest(np.packbits(np.stack([flips, known])).tolist()),
            },
            {},
            folder / "run_metadata.json",
        )

    def run(self, *, force: bool = False) -> list[TargetStatus]:
        """The status of every wanted target; matching files of an earlier run are kept."""
        if not force and self.record.is_complete():
            return [TargetStatus(**status) for status in self.record.summary()["statuses"]]
        for stale in [
            path
            for pattern in ("association_rules_*", "rule_combo_*", "optimal_rule_set_*", "run_metadata.json")
            for path in self.folder.glob(pattern)
        ]:
            stale.unlink()
        statuses = [self._fit_target(target) for target in FlipTarget if self.settings.wants(target, self.neuron)]
        if not any(status.failed for status in statuses):
            self.record.finish(
                sorted(self.folder.glob("*.csv")), summary={"statuses": [asdict(status) for status in statuses]}
            )
        return statuses

    def _fit_target(self, target: FlipTarget) -> TargetStatus:
        eligible = self.known & target.eligible(self.problem.baseline)
        train, test = eligible & self.problem.is_fit, eligible & self.problem.is_test
        status, reason = self.settings.minimum.status(self.flips[train], self.flips[test]), ""
        if status == "ok":
            try:
                self._write_rules(target, train, test)
            except Exception as error:  # noqa: BLE001 - one target's failure must not lose the others; it is reported
                status, reason = "failed", f"{type(error).__name__}: {error}"
        return TargetStatus(
            str(self.neuron),
            self.neuron.key,
            target.column(self.neuron),
            target.rows_name,
            status,
            reason,
            int(train.sum()),
            int(self.flips[train].sum()),
            int(test.sum()),
            int(self.flips[test].sum()),
        )

    def _write_rules(self, target: FlipTarget, train_rows: np.ndarray, test_rows: np.ndarray) -> None:
        """Fit on TRAIN, score on TEST; then, apart, fit and score on both."""
        from lib.rule_files import write_rules

        train, test = self._labelled(train_rows), self._labelled(test_rows)
        both = train.followed_by(test)
        model = self._fit(target, train, TRAIN)
        whole = self._fit(target, both, ALL_FIT) if self.settings.emit_all_fit else None
        column = target.column(self.neuron)
        both_rows = np.concatenate([np.flatnonzero(train_rows), np.flatnonzero(test_rows)])
        baseline_of_train = self.problem.baseline[train_rows]
        chosen = choose_baseline_rule(train.y, baseline_of_train)
        known = mcc_of(chosen.fires(baseline_of_train), train.y)
        more = {
            f"rule_combo_train_{column}.csv": {"baseline_rule": chosen.value, "baseline_rule_MCC": known},
            f"rule_combo_{column}.csv": self._honest(target, TEST, model, test, np.flatnonzero(test_rows), chosen),
        }
        if whole is not None:
            chosen = choose_baseline_rule(both.y, self.problem.baseline[both_rows])
            more[f"rule_combo_all_fit_{column}.csv"] = self._honest(target, ALL_FIT, whole, both, both_rows, chosen)
        write_rules(
            self.folder,
            column,
            model,
            train,
            test=test,
            all_fit_model=whole,
            with_test_selected=self.settings.emit_test_selected,
            seed=derived_seed(self.settings.seed, "stage7 intervals", column),
            more_columns=more,
        )

    def _labelled(self, rows: np.ndarray) -> LabelledRows:
        from lib.rule_files import LabelledRows

        return LabelledRows(np.asarray(self.problem.features[rows]), self.problem.feature_names, self.flips[rows])

    def _fit(self, target: FlipTarget, rows: LabelledRows, scope: str) -> RuleSHAP:
        from lib.ruleshap import RuleSHAP

        settings = self.settings
        model = RuleSHAP(
            max_conditions=settings.max_conditions,
            max_literals=settings.max_literals,
            use_shap_in_xgb=settings.use_shap_in_xgb,
            use_shap_in_lasso=settings.use_shap_in_lasso,
            unique_rows_in_shap=settings.unique_rows_in_shap,
            random_state=derived_seed(settings.seed, "stage7", target.column(self.neuron), scope),
        )
        return model.fit(rows.features, rows.y, feature_names=rows.names)

    def _honest(
        self,
        target: FlipTarget,
        scope: str,
        model: RuleSHAP,
        rows: LabelledRows,
        numbers: np.ndarray,
        baseline_rule: BaselineRule,
    ) -> dict[str, Any]:
        """Intervals, gain over the rule that knows only the baseline label (chosen where the rule was), chance.

        numbers: [row] where the rows are in the problem.
        """
        random = rng(self.settings.seed, "stage7 bootstrap", target.column(self.neuron), scope)
        groups = self.problem.groups
        return honest_scores(
            model.fires(rows.features),
            rows.y,
            self.problem.baseline[numbers],
            baseline_rule,
            random,
            self.settings.n_bootstrap,
            held_out=scope == TEST,
            groups=None if groups is None else groups[numbers],
        )

