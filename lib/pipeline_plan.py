"""The pipeline as data: the commands, in order, that a set of choices asks for. Nothing is run here."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from lib.run_names import REGIMES, RunChoices, RunPaths, size_text
from lib.task_spec import resolve_task_spec

METHOD = "EAP-IG-inputs"
POINTS_PER_CIRCUIT = 128
POINTS_PER_ABLATION = 64
MEAN_POINTS = 256
DONOR_MEAN_POINTS = 2048
SAMPLING_MAX_POINTS = 10_000
# Stage 5 evaluates without single donors: it uses the mean of the same kind.
WITHOUT_DONOR = {"mean-donor": "mean", "mean-donor-positional": "mean-positional", "resample": "mean-positional"}
RULES_PREFIX = "optimal_rule_set"


@dataclass(frozen=True)
class StageCall:
    """One command of the pipeline: a numbered script and its arguments."""

    stage: int
    title: str
    script: str
    arguments: list[str]


class PipelinePlan:
    """Turns parsed choices into stage calls."""

    def __init__(self, args: argparse.Namespace, paths: RunPaths) -> None:
        self.args = args
        self.paths = paths

    def calls(self) -> list[StageCall]:
        """Every call of the pipeline, in order."""
        calls = [self._answers(), self._features()]
        if not self.paths.choices.spectral_splits:
            calls.append(self._rules())
        if self.paths.choices.spectral_discovery:
            calls.append(self._discovery_plan())
        if self.paths.choices.spectral_anchoring:
            calls.extend(self._anchoring_plan(regime) for regime in REGIMES)
        calls.append(self._circuits())
        calls.extend(self._agonists(regime) for regime in REGIMES)
        calls.append(self._flips())
        return calls

    # ------------------------------------------------------------ shared groups of flags

    def _common(self) -> list[str]:
        args = self.args
        flags = ["--task_module", task_module(args.experiment), "--seed", str(args.seed)]
        return flags + ["--force"] * args.force + ["--quiet"] * args.quiet

    def _model(self, *, batch: bool = True) -> list[str]:
        args = self.args
        flags = ["--ai_model", args.model, "--device", args.device, "--dtype", args.dtype]
        if args.ai_model_cache_dir:
            flags += ["--ai_model_cache_dir", args.ai_model_cache_dir]
        return flags + (["--batch_size", str(args.batch_size)] if batch else [])

    def _spectral(self) -> list[str]:
        return ["--spectral_cache_dir", str(self.paths.task_cache_dir), "--spectral_space", "hidden",
                "--rep_hook_name", "ln_final.hook_normalized", "--rep_pooling", "last", "--spectral_dim", "32"]

    def _fake(self) -> list[str]:
        return ["--fake_targets"] * self.args.incorrect_rules

    def _replacement(self) -> str:
        """Stage 5 attributes the replacement that stage 6 makes, or the nearest one it knows."""
        return WITHOUT_DONOR.get(self.args.eval_intervention, self.args.eval_intervention)

    def _mean_points(self) -> list[str]:
        points = DONOR_MEAN_POINTS if "donor" in self.args.eval_intervention else MEAN_POINTS
        return ["--points_to_use_for_mean_ablation", str(points)]

    # ------------------------------------------------------------ the stages

    def _answers(self) -> StageCall:
        return StageCall(1, "prompts and answers", "1_generate_prompts_and_answers.py", [
            *self._model(), *self._common(), "--prompts_answers_pkl_file", str(self.paths.answers),
            "--stats_json_out", str(self.paths.features_dir), *self._task_settings()])

    def _task_settings(self) -> list[str]:
        """Flags of the task's settings that are not at their default; only stage 1 needs them, it records them."""
        defaults = resolve_task_spec(task_module(self.args.experiment)).Settings().to_json()
        flags: list[str] = []
        for name, value in task_settings(self.args).items():
            if isinstance(value, bool) and value != defaults[name]:
                flags.append(f"--{name}" if value else f"--no-{name}")
            elif value != defaults[name]:
                flags += [f"--{name}", str(value)]
        return flags

    def _features(self) -> StageCall:
        args = self.args
        source = ["--no_llm"] if args.no_llm else ["--ai_model", args.feature_model]
        if args.base_url and not args.no_llm:
            source += ["--base_url", args.base_url]
        filters = ["--drop_near_duplicate_features", "--near_duplicate_features_threshold", "0.9999",
                   "--drop_low_predictive_power_features", "--min_delta", "0.2"]
        if args.z_thresh >= 0:
            filters += ["--drop_high_mad_variance_features", "--z_thresh", str(args.z_thresh)]
        return StageCall(2, "features", "2_generate_features.py", [
            *source, *self._common(), "--prompts_answers_pkl_file", str(self.paths.answers),
            "--features_scores_dir", str(self.paths.features_dir), "--cache_dir", str(self.paths.model_cache_dir),
            "--num_correct_example_prompts", "32", "--num_incorrect_example_prompts", "32", *filters])

    def _rules(self) -> StageCall:
        control = ["--fake_target_max_abs_corr", "0.05", "--fake_target_max_tries", "500"]
        return StageCall(3, "rules of the behaviour", "3_extract_rules.py", [
            *self._common(), "--features_scores_dir", str(self.paths.features_dir),
            "--rules_dir", str(self.paths.rules_dir), "--npermutations", "5", "--only_unique_datapoints_in_shap",
            "--use_shap_in_xgb", "--use_shap_in_lasso", *self._fake(), *(control if self.args.incorrect_rules else [])])

    def _rule_inputs(self) -> list[str]:
        return ["--features_scores_dir", str(self.paths.features_dir), "--rules_dir", str(self.paths.rules_dir),
                "--rules_glob", RULES_PREFIX, *self._fake()]

    def _sampling(self, title: str, arguments: list[str]) -> StageCall:
        return StageCall(4, title, "4_spectral_sample_datapoints.py", [
            *self._model(), *self._common(), *self._rule_inputs(), *self._spectral(), "--use_global_clusters",
            "--compute_cover_stats", *arguments])

    def _discovery_plan(self) -> StageCall:
        points = str(POINTS_PER_CIRCUIT)
        return self._sampling("datapoints for attribution", [
            "--baseline_subset", "all", "--pair_by_similarity_len_matched", "--pair_similarity_metric", "euclidean",
            "--min_points_per_ablation", points, "--max_points_per_ablation", points, "--global_n_clusters", "32",
            "--output_path", str(self.paths.discovery_plan)])

    def _anchoring_plan(self, regime: str) -> StageCall:
        points = str(POINTS_PER_ABLATION)
        return self._sampling(f"datapoints for ablation, {regime} baseline", [
            "--baseline_subset", regime, "--min_points_per_ablation", points, "--max_points_per_ablation", points,
            "--global_n_clusters", "16", "--output_path", str(self.paths.anchoring_plan(regime))])

    def _circuits(self) -> StageCall:
        args = self.args
        if self.paths.choices.spectral_splits:
            # A single cluster would leave nothing to contrast it with.
            n_clusters = [str(max(2, args.max_number_of_circuits_to_analyze))]
            sampling = ["--cluster_by_spectral", "--pair_similarity_metric", "euclidean", *self._spectral(),
                        *(["--global_n_clusters", *n_clusters] if args.max_number_of_circuits_to_analyze > 0 else [])]
        elif self.paths.choices.spectral_discovery:
            sampling = ["--sampling_strategy", "plan", "--sampling_plan_path", str(self.paths.discovery_plan)]
        else:
            sampling = ["--sampling_strategy", "random", "--pair_similarity_metric", "euclidean"]
        flags = ["--decode_only"] * args.decode_only + ["--mlp_neurons_only"] * args.mlp_neurons_only
        flags += ["--include_zero_scores"] * args.include_zero_scores
        return StageCall(5, "candidate neurons", "5_discover_circuits.py", [
            *self._model(batch=False), *self._common(), *self._rule_inputs(),
            "--output_data_dir", str(self.paths.circuits_dir), "--cache_dir", str(self.paths.model_cache_dir),
            "--method", METHOD, "--intervention", self._replacement(), "--circuit_level", args.circuit_level,
            "--circuit_size", size_text(args.circuit_size), "--absolute_value_attributions",
            "--eval_intervention", self._replacement(),
            *self._mean_points(),
            "--temporal_agg", "mean", "--max_pairs_per_circuit", str(POINTS_PER_CIRCUIT),
            "--max_n_of_rules_to_analyze", str(args.max_number_of_circuits_to_analyze), *sampling, *flags])

    def _agonists(self, regime: str) -> StageCall:
        args = self.args
        flags = ["--fast_ablation"] * self.paths.choices.fast_anchoring + ["--decode_only"] * args.decode_only
        flags += ["--mlp_neurons_only"] * args.mlp_neurons_only
        flags += ["--cluster_by_spectral"] * self.paths.choices.spectral_splits
        if args.max_number_of_circuits_to_search > 0:
            flags += ["--max_n_of_rules_to_analyze", str(args.max_number_of_circuits_to_search)]
        if self.paths.choices.spectral_anchoring:
            plan = str(self.paths.anchoring_plan(regime))
            flags += ["--sampling_strategy", "plan", "--sampling_plan_path", plan]
        return StageCall(6, f"agonist neurons, {regime} baseline", "6_analyze_bag_of_rules.py", [
            *self._model(), *self._common(), "--input_data_dir", str(self.paths.circuits_dir),
            "--output_data_dir", str(self.paths.regime_dir(regime)),
            "--cache_dir", str(self.paths.model_cache_dir),
            "--scores_path", str(self.paths.features_dir / "scores.csv"), "--baseline_subset", regime,
            "--intervention", args.eval_intervention, *self._mean_points(),
            "--n_associated", str(POINTS_PER_ABLATION), "--n_unrelated", str(POINTS_PER_ABLATION),
            "--search_epsilon", args.min_flip_rate, "--sign_split_first", *flags])

    def _flips(self) -> StageCall:
        args = self.args
        return StageCall(7, "flips and anchored rules", "7_refine_neuron_anchored_rules.py", [
            *self._model(), *self._common(), "--rules_dir", str(self.paths.flip_rules_dir),
            "--features_scores_dir", str(self.paths.features_dir),
            "--circuit_agonists_path", str(self.paths.agonists_dir), "--search_epsilon", args.min_flip_rate,
            "--stats_dirname", self.paths.choices.run_name, "--use_spectral_sampling",
            "--sampling_max_points", str(SAMPLING_MAX_POINTS), *self._spectral(), "--global_n_clusters", "64",
            *self._mean_points(), "--intervention", args.eval_intervention, "--extract_rules",
            "--only_unique_datapoints_in_shap", *["--decode_only"] * args.decode_only, "--joint_ablation",
            "--summarize_rule_metrics",
            "--min_rule_dataset_coverage", str(args.min_rule_dataset_coverage)])


def task_module(experiment: str) -> str:
    """Module of a task, from its short name."""
    return f"lib.tasks.{experiment}_task"


def task_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The task's settings that the command line asks for, by name."""
    return resolve_task_spec(task_module(args.experiment)).Settings.from_arguments(args).to_json()


def run_choices(args: argparse.Namespace) -> RunChoices:
    """The choices that appear in names."""
    return RunChoices(
        spectral_splits=args.spectral_splits, spectral_discovery=args.circuit_discovery == "spectral",
        spectral_anchoring=args.anchoring_plan == "spectral", fast_anchoring=args.anchoring == "fast",
        decode_only=args.decode_only, incorrect_rules=args.incorrect_rules, circuit_size=args.circuit_size,
        min_flip_rate=args.min_flip_rate, eval_intervention=args.eval_intervention)
