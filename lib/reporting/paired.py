"""Stage 10: methods compared in pairs over units (task x model): counts at a threshold and areas over thresholds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lib.cli import Report, UserError, rng
from lib.reporting.naming import RunMode
from lib.reporting.paired_samples import write_sample_statistics
from lib.reporting.scopes import Scope, parse_scopes
from lib.reporting.session import Session
from lib.reporting.stats import Alternative, area_under_thresholds, holm, paired_summary, sign_flip_test, sign_test
from lib.reporting.tables import Table

REFERENCE = RunMode.SPECTRAL_PLAN
OTHERS = (RunMode.SPECTRAL_SPLIT, RunMode.RANDOM_PLAN, RunMode.FAKE_TARGETS)
TEST_COLUMNS = (
    "score_scope",
    "n_pairs",
    "n_nonzero",
    "n_pos",
    "n_neg",
    "mean_diff",
    "median_diff",
    "min_diff",
    "max_diff",
    "sign_p",
    "signflip_p",
    "signflip_mode",
    "A_method",
    "B_method",
    "endpoint",
    "sign_p_holm",
    "signflip_p_holm",
)
NO_ROWS = "NO_ROWS_FOR_SCORE_SCOPE.txt"
OUTPUTS = (
    "table2_descriptive_totals.csv",
    "table2_descriptive_n_runs.csv",
    *(
        f"method_comparison_{name}_{kind}.csv"
        for name in ("primary_threshold", "autc")
        for kind in ("exact_tests", "pairs")
    ),
    *("per_neuron_scores.csv", "per_unit_metrics.csv", "sampled_pairwise_comparisons.csv"),
)
PAIR_COLUMNS = ("score_scope", "A_method", "B_method", "endpoint", "task", "llm", "A", "B", "diff")


# ---------------------------------------------------------------- reading


def read_long(path: Path, metric: str) -> pd.DataFrame:
    """The long CSV as `score_scope, task, llm, run_name, method, threshold, value, floor`.

    Scopes and run names are None where it has no column of them.

    Raises:
        UserError: the file, a column or every known method is missing.
    """
    from lib.artifacts import read_csv

    frame = read_csv(path, "long CSV of counts", low_memory=False)
    names = {
        "task": ("task", "Task"),
        "method": ("stats_label", "Method", "method"),
        "threshold": ("threshold",),
        "value": (metric,),
    }
    columns = {key: next((name for name in options if name in frame), None) for key, options in names.items()}
    llm = _llm_column(frame)
    missing = [names[key][0] for key, name in columns.items() if name is None] + ([] if llm is not None else ["llm"])
    if missing or llm is None:
        raise UserError(
            f"{path} has no column {', '.join(missing)}; give Table 2's long CSV or stage 8's all-tasks CSV"
        )
    long = pd.DataFrame({key: frame[name] for key, name in columns.items()}).assign(llm=llm)
    scope = next((name for name in ("score_scope", "Score scope") if name in frame), None)
    long["score_scope"] = [Scope.parse(str(text)).slug for text in frame[scope]] if scope else None
    modes = [RunMode.from_label(str(text)) for text in long["method"]]
    long["method"] = [mode.value if mode else None for mode in modes]
    long["threshold"] = pd.to_numeric(long["threshold"], errors="coerce").round(6)
    long["value"] = pd.to_numeric(long["value"], errors="coerce")
    floor = "min_rule_dataset_coverage" if "min_rule_dataset_coverage" in frame else "min_dataset_coverage"
    run = next((name for name in ("run_name", "stats_dirname") if name in frame), None)
    long["run_name"] = frame[run].astype("string") if run else None
    long["floor"] = pd.to_numeric(frame[floor], errors="coerce") if floor in frame else np.nan
    long = long[long["method"].notna() & long["threshold"].notna()]
    if long.empty:
        raise UserError(f"{path} has no row of a known method; expected {', '.join(mode.value for mode in RunMode)}")
    return long


def _llm_column(frame: pd.DataFrame) -> pd.Series | None:
    """The model with its organisation: models of equal name from different organisations are different units."""
    if "llm" in frame:
        return frame["llm"].astype("string")
    name = next((name for name in ("model", "Model", "ai_model") if name in frame), None)
    if name is None:
        return None
    models = frame[name].astype("string")
    organisation = frame["org"].astype("string").fillna("") if "org" in frame else None
    if organisation is None:
        return models
    return models.where((organisation == "") | models.str.contains("/", regex=False), organisation + "/" + models)


def of_scope(long: pd.DataFrame, scope: Scope, named: Sequence[Scope]) -> pd.DataFrame:
    """Rows of a scope. A file that does not say its scope counts for the one scope that the user names.

    Raises:
        UserError: the file says no scope and several were asked for: one of them would be another's numbers.
    """
    if long["score_scope"].notna().any():
        return long[long["score_scope"] == scope.slug]
    if len(named) != 1:
        raise UserError("the CSV has no column score_scope; say with --score_scope which one scope its counts are of")
    return long


def pivot(long: pd.DataFrame) -> pd.DataFrame:
    """Values [(task, llm, threshold), method]; equal keys are averaged, absent ones NaN."""
    table = long.groupby(["task", "llm", "threshold", "method"])["value"].mean().unstack("method")
    return table[[mode.value for mode in RunMode if mode.value in table]]


# ---------------------------------------------------------------- totals


def totals(values: pd.DataFrame, thresholds: Sequence[float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(sums over units, numbers of contributing units), [method, threshold]; without any unit the sum is NaN."""
    by_threshold = values.groupby(level="threshold")
    wanted = [round(threshold, 6) for threshold in thresholds]
    sums = by_threshold.sum(min_count=1).reindex(wanted).T
    counts = by_threshold.count().reindex(wanted, fill_value=0).T
    for table in (sums, counts):
        table.columns = [f"{threshold:.2f}" for threshold in wanted]
        table.index.name = "method"
    return sums.reset_index(), counts.reset_index()


# ---------------------------------------------------------------- endpoints


def endpoint_at(values: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Counts at one threshold, [(task, llm), method].

    Raises:
        UserError: the threshold is not among the data's.
    """
    present = sorted(set(values.index.get_level_values("threshold")))
    if not any(abs(threshold - value) < 1e-6 for value in present):
        raise UserError(
            f"no counts at threshold {threshold}; the CSV has {', '.join(f'{value:g}' for value in present)}"
        )
    return values.xs(round(threshold, 6), level="threshold")


def endpoint_area(values: pd.DataFrame, thresholds: Sequence[float]) -> pd.DataFrame:
    """Area over the thresholds, [(task, llm), method]; NaN where a threshold is missing."""
    grid = [round(threshold, 6) for threshold in thresholds]
    present = set(values.index.get_level_values("threshold"))
    if not present & set(grid):
        raise UserError(f"none of --thresholds {thresholds} is in the CSV; it has {sorted(present)}")
    areas = {}
    for method in values:
        wide = values[method].unstack("threshold").reindex(columns=grid)
        areas[method] = pd.Series([area_under_thresholds(grid, row) for row in wide.to_numpy()], index=wide.index)
    return pd.DataFrame(areas)


def compare(
    table: pd.DataFrame, endpoint: str, scope: Scope, alternative: Alternative, random: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(tests, pairs) of the reference against each other method; Holm over the three, for each test."""
    tests, pairs = [], []
    for other in OTHERS:
        both = pd.DataFrame(
            {"A": table.get(REFERENCE.value, np.nan), "B": table.get(other.value, np.nan)}, index=table.index
        ).dropna()
        differences = (both["A"] - both["B"]).to_numpy(dtype=float)
        flip = sign_flip_test(differences, alternative, random)
        ident = {"A_method": REFERENCE.value, "B_method": other.value, "endpoint": endpoint}
        tests.append(
            {
                "score_scope": scope.slug,
                **paired_summary(differences)._asdict(),
                "sign_p": sign_test(differences, alternative),
                "signflip_p": flip.p,
                "signflip_mode": flip.mode,
                **ident,
            }
        )
        pairs.append(both.reset_index().assign(score_scope=scope.slug, diff=differences, **ident))
    frame = pd.DataFrame(tests)
    for name in ("sign_p", "signflip_p"):
        frame[f"{name}_holm"] = holm(frame[name])
    return frame[list(TEST_COLUMNS)], pd.concat(pairs, ignore_index=True).reindex(columns=list(PAIR_COLUMNS))


# ---------------------------------------------------------------- the stage


def compute_threshold_statistics(args: argparse.Namespace, report: Report) -> None:
    """Stage 10."""
    scopes = parse_scopes(args.score_scope)
    long = read_long(Path(args.csv), args.metric)
    tasks = [task for task in args.tasks.split(",") if task.strip()]
    if tasks:
        long = long[long["task"].isin([task.strip() for task in tasks])]
    if long.empty:
        present = ", ".join(sorted(set(read_long(Path(args.csv), args.metric)["task"])))
        raise UserError(f"no row of --tasks {args.tasks}; the CSV has {present}")
    n_found = 0
    sessions = []
    for scope in scopes:
        out_dir = Path(args.out_dir) / (scope.slug if len(scopes) > 1 else "") if args.out_dir else None
        session = Session(out_dir or Path(), report, [Path(args.csv).parent])
        session.inputs.add(Path(args.csv))
        rows = of_scope(long, scope, scopes)
        if rows.empty:
            _note_no_rows(scope, out_dir, report)
            continue
        n_found += 1
        _statistics_of(rows, scope, args, session, is_written=out_dir is not None)
        sessions.append(session)
    if not n_found:
        raise UserError(f"{args.csv} has no row of scope {args.score_scope}; choose among the scopes it has")
    for session in sessions:
        if args.out_dir:
            session.finish("10_compute_threshold_sweep_stats.py", args)
        else:
            session.issues.tell(report, Path())


def _note_no_rows(scope: Scope, out_dir: Path | None, report: Report) -> None:
    report.line(f"no rows of scope {scope.slug}")
    if out_dir is not None:
        from lib.artifacts import atomic_write

        for name in OUTPUTS:  # of an earlier run with other rows
            (out_dir / name).unlink(missing_ok=True)
        with atomic_write(out_dir / NO_ROWS) as handle:
            handle.write(f"The CSV has no rows of scope {scope.slug}: nothing was computed.\n")


def _statistics_of(
    rows: pd.DataFrame, scope: Scope, args: argparse.Namespace, session: Session, *, is_written: bool
) -> None:
    """Totals, primary endpoint, area and, with a data root, neurons; one scope."""
    values = pivot(rows)
    alternative = Alternative(args.alt)
    primary = args.primary_threshold_all_fit if scope is Scope.ALL_FIT else args.primary_threshold
    floors = sorted(set(rows["floor"].dropna()))
    stamp = {"score_scope": scope.slug, "min_rule_dataset_coverage": floors[0] if len(floors) == 1 else np.nan}
    sums, counts = totals(values, args.thresholds)
    tables = {"table2_descriptive_totals": sums.assign(**stamp), "table2_descriptive_n_runs": counts.assign(**stamp)}
    endpoints = {
        "primary_threshold": (f"count_at_{primary:.2f}", endpoint_at(values, primary)),
        "autc": ("AUTC", endpoint_area(values, args.thresholds)),
    }
    _tell_totals(sums, counts, scope, session.report)
    for name, (endpoint, table) in endpoints.items():
        random = rng(args.seed, "stage10", scope.slug, endpoint)
        tests, pairs = compare(table, endpoint, scope, alternative, random)
        stamped = stamp["min_rule_dataset_coverage"]
        tables[f"method_comparison_{name}_exact_tests"] = tests.assign(
            alternative=args.alt, min_rule_dataset_coverage=stamped
        )
        tables[f"method_comparison_{name}_pairs"] = pairs.assign(min_rule_dataset_coverage=stamped)
        _tell_tests(tests, endpoint, args.alt, session.report)
    if is_written:
        (session.out_dir / NO_ROWS).unlink(missing_ok=True)
        for stem, table in tables.items():
            session.csv(f"{stem}.csv", table)
    if args.data_root and not args.skip_sample_stats:
        write_sample_statistics(args, scope, session, rows, is_written=is_written)


def _tell_totals(sums: pd.DataFrame, counts: pd.DataFrame, scope: Scope, report: Report) -> None:
    report.heading(f"{scope.label}: {scope.meaning}")
    for row in counts.itertuples(index=False):
        report.line(f"{row[0]}: units per threshold {', '.join(str(value) for value in row[1:])}")
    caption = f"High-quality neurons over units, {scope.label}"
    report.line(Table("totals", sums, caption, label=f"totals_{scope.slug}").latex())


def _tell_tests(tests: pd.DataFrame, endpoint: str, alternative: str, report: Report) -> None:
    report.line(f"{endpoint}, A - B {alternative} (A = {REFERENCE.value}):")
    for row in tests.itertuples(index=False):
        if not row.n_pairs:
            report.line(f"  B = {row.B_method}: no unit has both methods")
            continue
        report.line(
            f"  B = {row.B_method}: {row.n_pairs} pairs ({row.n_pos} up, {row.n_neg} down), mean difference "
            f"{row.mean_diff:.3g}; sign p {row.sign_p:.3g} (Holm {row.sign_p_holm:.3g}), sign-flip p "
            f"{row.signflip_p:.3g} (Holm {row.signflip_p_holm:.3g})"
        )
