"""Stage 3: short symbolic rules of the behaviour (RuleSHAP), from the features of stage 2.

Rules are chosen on TRAIN rows and scored once on TEST; ALL-FIT rules, fitted on all rows, stand apart. A rule is
reported only if it predicts unseen TRAIN rows better than chance; without one, the files say so.
"""

from __future__ import annotations

import argparse

from lib.cli import Report, add_task_arguments, count, positive_int, positive_share, share, stage_main

BASELINES = ("rulefit", "skope", "tree", "logistic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of stage 3."""
    add_task_arguments(parser)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--features_scores_dir", required=True, help="stage 2's folder with scores.csv and features.json"
    )
    files.add_argument("--rules_dir", default="xai_analyses_results", help="folder for the rules")
    rules = parser.add_argument_group("rules")
    rules.add_argument("--max_conditions", type=positive_int, default=3, help="most conditions in one rule")
    rules.add_argument("--max_rules", type=positive_int, default=5, help="most rules in the optimal set")
    rules.add_argument("--inner_folds", type=_folds, default=5, help="folds that choose the size of the rule set")
    rules.add_argument("--inner_repeats", type=positive_int, default=3, help="times that is done, on different folds")
    rules.add_argument(
        "--rule_alpha",
        type=positive_share,
        default=0.01,
        help="a rule set is reported if its agreement with unseen TRAIN rows has a smaller p-value",
    )
    rules.add_argument(
        "--only_unique_datapoints_in_rule_extraction",
        action="store_true",
        help="fit and score on distinct (features, target) TRAIN rows",
    )
    rules.add_argument("--no_emit_all_fit_rules", action="store_true", help="skip the rules fitted on TRAIN and TEST")
    rules.add_argument(
        "--emit_test_selected",
        action="store_true",
        help="also choose among the TRAIN rules on TEST: optimistic, for comparison with published tables",
    )
    _add_shap_arguments(parser.add_argument_group("SHAP"))
    _add_control_arguments(parser.add_argument_group("controls"))


def _add_shap_arguments(shap: argparse._ArgumentGroup) -> None:
    shap.add_argument(
        "--use_shap_in_xgb", action="store_true", help="grow trees on features in proportion to their SHAP importance"
    )
    shap.add_argument(
        "--use_shap_in_lasso",
        action="store_true",
        help="weigh the L1 penalty of a rule by the SHAP importance of its features",
    )
    shap.add_argument(
        "--only_unique_datapoints_in_shap", action="store_true", help="explain distinct (features, target) rows"
    )
    shap.add_argument(
        "--fast_shap_estimate",
        action="store_true",
        help="path attributions (Saabas) in place of exact tree SHAP values",
    )


def _add_control_arguments(controls: argparse._ArgumentGroup) -> None:
    controls.add_argument(
        "--npermutations",
        type=count,
        default=10,
        help="shuffles of the target that give the null of importances and of the best score",
    )
    controls.add_argument(
        "--stability_resamples", type=count, default=20, help="resamples in which each rule is looked for again"
    )
    controls.add_argument(
        "--baselines",
        type=_baselines,
        default=(),
        help=f"other learners to compare with, separated by commas: {','.join(BASELINES)}",
    )
    controls.add_argument(
        "--fake_targets",
        action="store_true",
        help="control: rules of shuffled targets, in files of their own (suffix _fake)",
    )
    controls.add_argument(
        "--fake_target_max_abs_corr",
        type=share,
        default=0.05,
        help="largest correlation of a shuffled target with the real one",
    )
    controls.add_argument("--fake_target_max_tries", type=positive_int, default=500, help="shuffles before giving up")


def _baselines(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such baseline: {', '.join(unknown)}; choose from {', '.join(BASELINES)}")
    return names


def _folds(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{value} folds cannot be held against each other; give at least 2")
    return value


def run(args: argparse.Namespace, report: Report) -> None:
    """Run the stage."""
    from lib.stages.rule_extraction import extract_rules

    extract_rules(args, report)


main = stage_main(add_arguments, run, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
