"""Stage 6 as a whole: for each baseline regime, the agonists of each rule, in files."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.agonist_files import Buckets, rule_file, write_rule_file, write_rule_knockout
from lib.artifacts import StageRecord, exclusive, text_digest
from lib.cli import Report
from lib.group_test_log import GroupTestLog
from lib.stages.agonist_diagnosis import AgonistDiagnosis
from lib.stages.agonist_inputs import Circuit, regimes_to_run
from lib.stages.agonist_prepare import Inputs, MakeAnswers, RulePreparer, read_inputs, rule_options
from lib.stages.agonist_report import fill_buckets, rule_body, rule_head, skipped_body, summary_lines
from lib.stages.agonist_rule import RuleFindings, RuleSearch
from lib.stages.agonist_slices import Pool, Skipped

if TYPE_CHECKING:
    from lib.stages.agonist_model import AgonistModel

LOG_NAME = "group_tests.jsonl"
# Flags that say where, how fast or how loudly; all others change the result and are part of the fingerprint.
_NO_RESULT = {
    "input_data_dir",
    "output_data_dir",
    "scores_path",
    "sampling_plan_path",
    "ai_model",
    "ai_model_cache_dir",
    "cache_dir",
    "device",
    "batch_size",
    "memory_mb",
    "force",
    "quiet",
    "dry_run",
    "baseline_subset",
}


def run_stage(args: Namespace, report: Report) -> None:
    """Run stage 6 for the regimes that the flags ask for; finished ones are only summarised."""
    inputs = read_inputs(args)
    model: AgonistModel | None = None
    for regime, folder in regimes_to_run(args, inputs.plan):
        record = stage_record(inputs, regime, folder)
        if args.dry_run:
            _describe(inputs, regime, report)
            continue
        report.heading(f"{regime} baseline")
        if record.is_complete() and not args.force:
            report.line(f"stage 6 is up to date: {folder}")
        else:
            from lib.stages.agonist_model import AgonistModel

            model = model or AgonistModel(args, inputs, report)
            with exclusive(folder):
                RegimeRun(inputs, regime, folder, record, report).run(model)
        for line in record.summary().get("lines", []):
            report.line(line)


def stage_record(inputs: Inputs, regime: str, folder: Path) -> StageRecord:
    """What decides the results of one regime."""
    from lib.modeling_and_ablation import model_identity

    settings = {key: value for key, value in vars(inputs.args).items() if key not in _NO_RESULT}
    if inputs.args.max_n_of_rules_to_analyze is None:
        # Not among the settings when not given: results of before this flag existed stay valid.
        del settings["max_n_of_rules_to_analyze"]
    settings |= {
        "model": model_identity(inputs.info.ai_model),
        "task": inputs.task.settings.to_json(),
        "baseline_subset": regime,
    }
    return StageRecord("6", settings, inputs.files, folder / "run_metadata.json")


def _describe(inputs: Inputs, regime: str, report: Report) -> None:
    """What a run would do, without loading a model."""
    args = inputs.args
    report.heading(f"{regime} baseline (dry run)")
    for circuit in inputs.circuits:
        pools = RulePreparer(inputs, regime).pools(circuit)
        if isinstance(pools, Skipped):
            report.line(f"{circuit.name}: would be skipped, {pools.reason}")
            continue
        wanted = (args.n_associated, args.n_unrelated)
        sizes = [min(len(pool.rows), most) for pool, most in zip(pools, wanted, strict=True)]
        n = len(circuit.neurons)
        report.line(
            f"{circuit.name}: {n} candidates in {len(circuit.layers)} components, {sizes[0]} associated and {sizes[1]} "
            f"unrelated datapoints; testing each candidate alone is {n * sum(sizes)} answers, the search needs fewer"
        )


class RegimeRun:
    """One baseline regime: its rules, one after the other, and its files."""

    def __init__(self, inputs: Inputs, regime: str, folder: Path, record: StageRecord, report: Report) -> None:
        self.inputs, self.regime, self.folder, self.record, self.report = inputs, regime, folder, record, report
        self.args, self.options = inputs.args, rule_options(inputs.args)
        self.preparer = RulePreparer(inputs, regime)
        self.buckets = Buckets(inputs.args.catastrophic_n_runs)
        self.outputs: list[Path] = []
        self.lines: list[str] = []

    def run(self, model: AgonistModel) -> None:
        """Analyse every rule and write all files. A log of tests made under another identity is not used."""
        started = time.time()
        log_path = self.folder / LOG_NAME
        if self.args.force:
            log_path.unlink(missing_ok=True)
        log = GroupTestLog(log_path, text_digest(model.identity(self.regime)))
        diagnosis = AgonistDiagnosis(self.args, self.folder, model.measure)
        n_rules = len(self.inputs.circuits)
        self.report.line(f"{n_rules} rules" + (f"; {len(log)} groups were tested before" if len(log) else ""))
        make_answers = model.answers_for(self.regime)
        rules = [self._rule(circuit, make_answers, log, diagnosis) for circuit in self.inputs.circuits]
        diagnosis.write_overall()
        self.outputs += diagnosis.outputs
        self.outputs.append(write_rule_knockout(self.folder, rules))
        self.outputs += self.buckets.write(self.folder)
        n_skipped = sum(rule["status"] == "skipped" for rule in rules)
        counts = {"n_agonists": len(self.buckets.agonists), "n_rules": n_rules, "n_skipped": n_skipped}
        self.record.finish(self.outputs, started=started, summary={"lines": self.lines, **counts})

    def _rule(
        self, circuit: Circuit, make_answers: MakeAnswers, log: GroupTestLog, diagnosis: AgonistDiagnosis
    ) -> dict[str, Any]:
        """Search one rule, diagnose its agonists and write its files; returns the content of its own."""
        path = rule_file(self.folder, circuit.target, circuit.circuit_id, is_cluster=circuit.is_cluster)
        pools = self.preparer.pools(circuit)
        content = rule_head(circuit, self.regime, self.args, pools)
        findings = pools if isinstance(pools, Skipped) else self._search(circuit, pools, make_answers, log)
        if isinstance(findings, Skipped):
            self.lines.append(f"{circuit.name}: skipped, {findings.reason}")
            content |= skipped_body(findings)
        else:
            fill_buckets(self.buckets, findings)
            self.lines += summary_lines(findings, self.args.search_epsilon)
            content |= rule_body(findings, self.inputs.table, self.args.sampling_strategy)
            content |= diagnosis.diagnose_rule(findings, path)
        content["config_fingerprint"] = self.record.fingerprint
        write_rule_file(path, content)
        self.outputs.append(path)
        return content

    def _search(
        self, circuit: Circuit, pools: tuple[Pool, Pool], make_answers: MakeAnswers, log: GroupTestLog
    ) -> RuleFindings | Skipped:
        """Prepare a rule's datapoints and search its candidates."""
        with self.report.counter(unit="answer", desc=circuit.name) as advance:
            rule = self.preparer.prepare(circuit, pools, make_answers, log, advance)
            return rule if isinstance(rule, Skipped) else RuleSearch(rule, self.options).run()
