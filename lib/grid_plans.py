"""The experiments as steps: `python -m lib.grid_plans experiments|sensitivity|resample|tables`, behind four shells.

TASKS, MODELS and MODES (lists separated by spaces or commas) restrict the grid; EXTRA_FLAGS, and everything after
`--`, goes to every pipeline run. A step that fails does not stop the others: the exit code is then 1 and the failed
ones are listed at the end. Finished runs are skipped, archived results are left as they are; `-- --force` runs both.

More variables: BASE_SIZE, SIZES and RATES (sensitivity), CANDIDATE_INTERVENTION and MEAN_POINTS (resample),
MIN_RULE_DATASET_COVERAGE, and OUT_ROOT, the folder of paper_tables/ and intervention_shift/.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from lib.cli import CommandParser, Report, UserError, exit_code, finite, positive_int, share
from lib.grid import MODELS, Cell, Selection, extra_flags, sensitivity_cells
from lib.grid_runner import REPOSITORY, Step, cell_paths, cell_step, one_data_root, parse_pipeline, run_steps
from lib.pipeline_plan import MEAN_POINTS, PipelinePlan
from lib.reporting.naming import RunMode
from lib.run_names import DEFAULT_CIRCUIT_SIZE, RunPaths

PYTHON = sys.executable
CANDIDATE_INTERVENTION = "mean-donor"
QUALITY_THRESHOLDS = ("0.50", "0.60", "0.70", "0.75", "0.80", "0.85")


def options(**values: object) -> list[str]:
    """A command line from names and values: `--out_dir x`; a list gives several words, True a flag without any."""
    words: list[str] = []
    for name, value in values.items():
        words.append(f"--{name}")
        if isinstance(value, list | tuple):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words


def _out_root() -> Path:
    """Folder of what summaries write beside the data: OUT_ROOT, by default the repository."""
    return Path(os.environ.get("OUT_ROOT", "."))


def _floor() -> str:
    return os.environ.get("MIN_RULE_DATASET_COVERAGE", "0.005")


# ---------------------------------------------------------------- the grid


def experiments(extra: Sequence[str], *, runs_only: bool = False) -> list[Step]:
    """Every cell; after each task the comparisons of its run modes and models, at the end those of all tasks.

    runs_only: the cells alone, for jobs that share the grid between them.
    """
    selection = Selection.from_environment()
    cells = selection.cells()
    if runs_only:
        return [cell_step(cell, extra) for cell in cells]
    data_root = one_data_root(cells, extra)
    out = data_root / "aggregated_visualizations"
    common = {"score_scope": "test", "min_rule_dataset_coverage": _floor()}
    steps: list[Step] = []
    for task in selection.tasks:
        steps += [cell_step(cell, extra) for cell in cells if cell.task == task]
        steps.append(_stage_8(data_root / task, out / task / "run_modes", f"run modes of {task}"))
        models = options(task_dir=data_root / task, out_dir=out / task, tau=0.2, eps=0.2, **common)
        steps.append(Step(f"models of {task}", [PYTHON, "9_compare_models.py", *models]))
    steps.append(_stage_8(data_root, out, "run modes of all tasks"))
    sweep = out / "aggregated_by_task" / "threshold_sweep_all_tasks_all_llms.csv"
    methods = options(csv=sweep, out_dir=out / "method_comparison", **common)
    return [*steps, Step("comparison of the methods", [PYTHON, "10_compute_threshold_sweep_stats.py", *methods])]


def _stage_8(stats_path: Path, out_dir: Path, title: str) -> Step:
    flags = options(
        stats_path=stats_path,
        out_dir=out_dir,
        rule_quality_metric="mcc",
        best_mode="tail@0.9",
        thr_min="0.70",
        thr_max="0.99",
        thr_step="0.01",
        score_scope="test",
        min_rule_dataset_coverage=_floor(),
    )
    return Step(title, [PYTHON, "8_compare_experiments.py", *flags])


def sensitivity(extra: Sequence[str]) -> list[Step]:
    """One factor at a time (SIZES, RATES) around the main run (BASE_SIZE), then stage 11 for each task and model."""
    for flag, variable in (("--circuit_size", "BASE_SIZE and SIZES"), ("--min_flip_rate", "RATES")):
        if any(word.partition("=")[0] == flag for word in extra):
            raise UserError(f"{flag} is what this analysis varies; set it with {variable}, like SIZES='500 1000'")
    selection = Selection.from_environment(tasks=("arithmetic", "bon_jailbreaking"), models=MODELS[:1])
    steps: list[Step] = []
    for cells in sensitivity_cells(selection):
        steps += [cell_step(cell, extra) for cell in cells]
        main = cell_paths(cells[0], extra)
        model = main.model_dir.relative_to(main.data_root / main.task).as_posix().replace("/", "_")
        base = {} if cells[0].circuit_size == DEFAULT_CIRCUIT_SIZE else {"baseline_M": cells[0].circuit_size}
        flags = options(
            stats_root=main.stats_dir.parent,
            out_dir=_out_root() / "paper_tables" / "sensitivity_summary" / main.task / model,
            baseline_run_name=main.choices.run_name,
            **base,
            score_scope=os.environ.get("SENSITIVITY_SCORE_SCOPE", "test,all_fit"),
            quality_thresholds=QUALITY_THRESHOLDS,
            min_rule_dataset_coverage=_floor(),
        )
        title = f"sensitivity of {main.task} / {main.ai_model}"
        steps.append(Step(title, [PYTHON, "11_summarize_sensitivity_analysis.py", *flags]))
    return steps


# ---------------------------------------------------------------- another intervention


@dataclass(frozen=True)
class RecheckPaths(RunPaths):
    """The main run's circuits and plans, with folders of their own for what another intervention changes."""

    intervention: str = CANDIDATE_INTERVENTION

    @property
    def agonists_dir(self) -> Path:
        """Beside the main run's, with the intervention's name."""
        return self.discovery_dir / f"{self.choices.bag_label}-{self.intervention}"

    @property
    def flip_rules_dir(self) -> Path:
        """A tree of its own: rules of another intervention are other rules."""
        return self.rules_dir / f"neuron_flip_rules_{self.intervention}"

    @property
    def stats_dir(self) -> Path:
        """The run's name with the intervention's."""
        return self.flip_rules_dir / "stats" / f"{self.choices.run_name}-{self.intervention}"


class RecheckPlan(PipelinePlan):
    """The pipeline's stages 6 and 7 under another intervention, with as many mean points: nothing else changes."""

    def _mean_points(self) -> list[str]:
        return ["--points_to_use_for_mean_ablation", os.environ.get("MEAN_POINTS", str(MEAN_POINTS))]

    def _flips(self):  # noqa: ANN202
        call = super()._flips()
        arguments = list(call.arguments)
        arguments[arguments.index("--stats_dirname") + 1] = self.paths.stats_dir.name
        return replace(call, arguments=arguments)


def resample(extra: Sequence[str]) -> list[Step]:
    """The main run, its stages 6 and 7 again with donors instead of means, and what shifts between the two."""
    selection = Selection.from_environment(tasks=("arithmetic",), models=(MODELS[1],), modes=(RunMode.SPECTRAL_PLAN,))
    kind = os.environ.get("CANDIDATE_INTERVENTION", CANDIDATE_INTERVENTION)
    steps = []
    for cell in selection.cells():
        base = cell_paths(cell, extra)
        args = parse_pipeline(cell.pipeline_arguments([*extra, "--eval_intervention", kind]))
        paths = RecheckPaths(**{field.name: getattr(base, field.name) for field in fields(RunPaths)}, intervention=kind)
        steps.append(cell_step(cell, extra))
        steps += [
            Step(f"{cell.title} with {kind}: {call.title}", [PYTHON, call.script, *call.arguments])
            for call in RecheckPlan(args, paths).calls()
            if call.stage in (6, 7)
        ]
        steps += _shift_steps(cell, base, paths)
    return steps


def _shift_steps(cell: Cell, base: RunPaths, candidate: RecheckPaths) -> list[Step]:
    model = base.model_dir.relative_to(base.data_root / base.task).as_posix().replace("/", "__")
    label = base.choices.eval_intervention
    out = _out_root() / "intervention_shift" / base.task / model / f"{label}_vs_{candidate.intervention}"
    steps = []
    for scope, folder, suffix in (("test", out, ""), ("all_fit", out / "all_fit", "_all_fit")):
        # Archived runs do not state the coverage of held-out rows: it is then NA, and said to be missing.
        lenient = {"allow_missing_hq_coverage": True} if scope == "test" else {}
        flags = options(
            baseline_dir=base.stats_dir,
            candidate_dir=candidate.stats_dir,
            output_dir=folder,
            output_csv=folder / f"intervention_shift_summary{suffix}.csv",
            baseline_label=label,
            candidate_label=candidate.intervention,
            task_name=base.task,
            model_name=base.ai_model,
            hq_score_scope=scope,
            **lenient,
        )
        title = f"shift of {cell.title}, scope {scope}"
        steps.append(Step(title, [PYTHON, "summarize_intervention_shift.py", *flags]))
    return steps


# ---------------------------------------------------------------- tables


def add_tables_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of run_paper_tables_generation.sh; dashes and underscores are the same."""
    parser.add_argument("data_root", nargs="?", help="folder of results, or a .zip (default: data)")
    parser.add_argument("out_dir", nargs="?", help="where the tables go (default: paper_tables)")
    parser.add_argument("--test_threshold", "--primary_threshold", type=finite, default=0.70, help="MCC of HQ on TEST")
    parser.add_argument("--all_fit_threshold", type=finite, default=0.70, help="MCC of HQ on ALL-FIT")
    parser.add_argument("--score_scopes", default="test,all_fit", help="scopes of the tables")
    parser.add_argument("--stats_score_scope", default="both", help="scopes of the method comparison")
    parser.add_argument("--sample_stat", default="mean", help="per-neuron statistic of the method comparison")
    parser.add_argument("--n_boot", type=positive_int, default=10_000, help="bootstrap draws of the method comparison")
    parser.add_argument(
        "--min_rule_dataset_coverage",
        type=share,
        default=os.environ.get("MIN_RULE_DATASET_COVERAGE", "0.005"),
        help="support floor",
    )


def tables(args: argparse.Namespace, data_root: Path) -> list[Step]:
    """The paper's tables, and the comparison of methods on the second."""
    out, floor = Path(args.out_dir or "paper_tables"), args.min_rule_dataset_coverage
    restricted = {name.lower(): os.environ[name] for name in ("TASKS", "MODELS") if os.environ.get(name)}
    make = options(
        data_root=data_root,
        out_dir=out,
        score_scopes=args.score_scopes,
        table1_coverage_score_scope="all_fit",
        hq_test_threshold=args.test_threshold,
        hq_all_fit_threshold=args.all_fit_threshold,
        min_rule_dataset_coverage=floor,
        **restricted,
    )
    compare = options(
        csv=out / "table2_threshold_sweep_per_run_long.csv",
        data_root=data_root,
        score_scope=args.stats_score_scope,
        sample_stat=args.sample_stat,
        sample_size=0,
        n_boot=args.n_boot,
        primary_threshold=args.test_threshold,
        primary_threshold_all_fit=args.all_fit_threshold,
        min_rule_dataset_coverage=floor,
        out_dir=out / "stats",
    )
    return [
        Step("paper tables", [PYTHON, "make_paper_tables.py", *make]),
        Step("method comparison", [PYTHON, "10_compute_threshold_sweep_stats.py", *compare]),
    ]


def run_tables(args: argparse.Namespace, report: Report) -> int:
    """Make the tables from a folder, or from an archive that is unpacked for the time it takes."""
    from lib.reporting.artifacts import open_tree

    data_root = _seen_from_repository(args.data_root, "data")
    if args.data_root is None and not (REPOSITORY / "data").is_dir() and (REPOSITORY / "data.zip").is_file():
        data_root = Path("data.zip")
    args.out_dir = _seen_from_repository(args.out_dir, "paper_tables")
    if not (REPOSITORY / data_root).exists():
        raise UserError(f"no results at {data_root}; run the experiments, or download the archive (see ARTIFACTS.md)")
    source = contextlib.nullcontext(data_root) if args.dry_run else open_tree(REPOSITORY / data_root)
    with source as folder:
        return run_steps(tables(args, Path(folder)), report, dry_run=args.dry_run)


def _seen_from_repository(text: str | None, default: str) -> Path:
    """A path of the user's working folder as the steps, which run in the repository, should see it."""
    if text is None:
        return Path(default)
    path = Path(text).expanduser().resolve()
    return path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path


# ---------------------------------------------------------------- command line

PLANS = {"experiments": experiments, "sensitivity": sensitivity, "resample": resample}


def main(argv: list[str] | None = None) -> int:
    """Run or print the steps of a plan."""
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    parser = CommandParser(
        prog="python -m lib.grid_plans",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plans = parser.add_subparsers(dest="plan", required=True)
    for name in (*PLANS, "tables"):
        plan = plans.add_parser(name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        plan.add_argument("--dry_run", action="store_true", help="print the commands and stop")
        if name == "experiments":
            plan.add_argument("--runs_only", action="store_true", help="the runs, without the comparisons between them")
        if name == "tables":
            add_tables_arguments(plan)
    known = [_underscores(word) for word in argv[:split]]
    args, unknown = parser.parse_known_args(known)
    report = Report()

    def run() -> int:
        if unknown:
            hint = "see --help" if args.plan == "tables" else "options for the pipeline come after --"
            raise UserError(f"unknown option: {' '.join(unknown)}; {hint}")
        if args.plan == "tables":
            return run_tables(args, report)
        choices = {"runs_only": args.runs_only} if args.plan == "experiments" else {}
        return run_steps(PLANS[args.plan](extra_flags(argv[split + 1 :]), **choices), report, dry_run=args.dry_run)

    return exit_code(run)


def _underscores(word: str) -> str:
    """`--n-boot=5` as `--n_boot=5`: both spellings of a flag are accepted."""
    if not word.startswith("--"):
        return word
    name, sign, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + sign + value


if __name__ == "__main__":
    raise SystemExit(main())
