"""The files of the comparison of two interventions: tables, report, figures."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lib.artifacts import atomic_write, save_figure, write_csv, write_json
from lib.cli import Report, UserError
from lib.reporting.artifacts import relative_to_any
from lib.reporting.intervention_shift import (
    Side,
    compare_globals,
    delta_statistics,
    high_quality_rows,
    join_neurons,
    layer_rows,
    load_side,
    neuron_sets,
)
from lib.reporting.issues import Issue
from lib.reporting.plots import report_style
from lib.reporting.scopes import Scope
from lib.reporting.session import Session
from lib.reporting.tables import cell_text

PREFIX = "intervention_shift"
PLOTTED = ("flip_any_rate", "c2i_rate", "i2c_rate", "flip_semantic_wrong_rate")
DEFINITIONS = {
    "zero": "0",
    "mean": "the coordinate's mean over all reference tokens",
    "mean-positional": "its mean over reference tokens at the same position",
    "mean-donor": "the real value of the coordinate, among all reference tokens, that is nearest to its mean",
    "mean-donor-positional": "the same among reference tokens at the same position",
    "resample": "the coordinate's value in another reference datapoint at the same position",
}
NOTES = (
    "delta: candidate minus baseline; an absent neuron counts as zero, except in paired_delta.",
    "Correlations are only given over neurons that both runs have.",
    "Percentages are of the rows on which the flip can happen, over the scope's own rows.",
)
_HQ_COLUMNS = (
    "intervention", "metric", "identified_neurons", "high_quality_neurons", "high_quality_fraction",
    "quality_metric_label", "quality_threshold", "score_scope", "score_scope_label", "union_all", "union_high",
    "sum_all", "sum_high", "denominator", "denominator_label", "all_union_pct", "high_union_pct",
    "hq_coverage_share_pct", "hq_eligible_points_pct", "hq_union_share_of_all_pct")  # fmt: skip


def summarize(args: argparse.Namespace, report: Report) -> None:
    """Compare and write everything.

    Raises:
        UserError: a run cannot be read, or has high-quality neurons whose coverage is not stated.
    """
    if args.baseline_label == args.candidate_label:
        raise UserError(f"both runs are called {args.baseline_label!r}; give --baseline_label and --candidate_label")
    scope = Scope.parse(args.hq_score_scope)
    sides = [
        load_side(Path(args.baseline_dir), args.baseline_label),
        load_side(Path(args.candidate_dir), args.candidate_label),
    ]
    out_dir = Path(args.output_dir or Path(args.output_csv).parent)
    session = Session(out_dir, report, [side.run.path.parent for side in sides])
    for side in sides:
        for reading, name in (
            (side.run.flip_global, "flip_stats_global.json"),
            (side.run.coverage, "coverage"),
            (side.run.coverage_by_layer, "coverage by layer"),
            (side.run.by_neuron, "flips"),
        ):
            session.take(side.run, reading, name)
    joined = join_neurons(sides[0].neurons, sides[1].neurons)
    quality = [row for side in sides for row in high_quality_rows(side, scope)]
    _check_coverage(sides, quality, session, args.allow_missing_hq_coverage)
    write_csv(args.output_csv, joined)
    order = joined["delta_flip_any_rate"].abs() if "delta_flip_any_rate" in joined else pd.Series(0.0, joined.index)
    top = joined.loc[order.sort_values(ascending=False, kind="stable").index].head(args.topk)
    session.csv(f"{PREFIX}_top_changes.csv", top)
    session.csv(f"{PREFIX}_hq_summary.csv", pd.DataFrame(quality, columns=list(_HQ_COLUMNS)))
    layers = pd.DataFrame([row for side in sides for row in layer_rows(side, scope)])
    session.csv(f"{PREFIX}_hq_by_layer.csv", layers)
    if not args.no_plots:
        session.written += draw_all(out_dir, joined, top, sides, quality, layers)
    content = _report(args, sides, joined, quality, session)
    write_json(out_dir / f"{PREFIX}_report.json", content)
    with atomic_write(out_dir / f"{PREFIX}_report.md") as handle:
        handle.write(as_markdown(content))
    sets = content["neuron_sets"]
    report.line(f"{sets['n_overlap']} neurons in both runs, {sets['n_gained']} gained, {sets['n_lost']} lost")
    session.finish("summarize_intervention_shift.py", args)


def _check_coverage(sides: list[Side], quality: list[dict], session: Session, allowed: bool) -> None:
    for side in sides:
        rows = [row for row in quality if row["intervention"] == side.label]
        incomplete = [row["metric"] for row in rows if row["high_union_pct"] is None]
        if not incomplete or rows[0]["high_quality_neurons"] == 0:
            continue
        message = f"no coverage of {', '.join(incomplete)} in scope {rows[0]['score_scope']}"
        if not allowed:
            raise UserError(
                f"{side.run.path}: {message}; run stage 7 again, choose another --hq_score_scope, or give "
                "--allow_missing_hq_coverage to leave it out"
            )
        session.issues.add(
            Issue(
                side.run.root.task,
                side.run.root.llm,
                side.run.run_name,
                "high_quality_neuron_flip_coverage.json",
                "missing",
                message,
            )
        )


def _report(
    args: argparse.Namespace, sides: list[Side], joined: pd.DataFrame, quality: list[dict], session: Session
) -> dict[str, Any]:
    bases = [*session.bases, session.out_dir, Path.cwd()]
    root = sides[0].run.root
    paired, union = delta_statistics(joined, args.seed)
    return {
        "mode": "flip_stats_by_neuron",
        "baseline_dir": relative_to_any(sides[0].run.path, bases[2:]),
        "candidate_dir": relative_to_any(sides[1].run.path, bases[2:]),
        "output_csv": Path(args.output_csv).name,
        "output_dir": relative_to_any(session.out_dir, bases[3:]),
        "context": {"task": args.task_name or root.task or None, "model": args.model_name or root.llm or None},
        "intervention_definitions": {side.label: DEFINITIONS.get(side.label, "") for side in sides},
        "high_quality_comparison": quality,
        "neuron_sets": neuron_sets(joined),
        "global_comparison": compare_globals(sides[0].run, sides[1].run),
        "paired_overlap_stats": paired,
        "union_missing_as_zero_stats": union,
        "notes": list(NOTES),
        "files": sorted(path.name for path in session.written),
    }


def as_markdown(content: dict[str, Any]) -> str:
    """The report for people."""
    context, sets = content["context"], content["neuron_sets"]
    labels = list(content["intervention_definitions"])
    lines = [
        f"# {labels[0]} against {labels[-1]}",
        "",
        f"Task {context['task']}, model {context['model']}.",
        "",
        f"Neurons: {sets['n_baseline']} and {sets['n_candidate']}; {sets['n_overlap']} in both, "
        f"{sets['n_gained']} gained, {sets['n_lost']} lost (Jaccard {cell_text(sets['jaccard'])}).",
        "",
        "## Neurons in both runs",
        "",
        "| metric | n | baseline | candidate | mean delta | 95 % interval | sign test p | Spearman |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, block in content["paired_overlap_stats"].items():
        if isinstance(block, str):
            lines.append(f"| {name} | {block} | | | | | | |")
            continue
        interval = f"{cell_text(block['mean_delta_ci95_low'])} to {cell_text(block['mean_delta_ci95_high'])}"
        cells = (block["n"], block["baseline_mean"], block["candidate_mean"], block["mean_delta"])
        lines.append(
            f"| {name} | {' | '.join(cell_text(float(cell)) for cell in cells)} | {interval} | "
            f"{cell_text(block['sign_test_p'])} | {cell_text(block['spearman'])} |"
        )
    lines += [
        "",
        "## High-quality neurons",
        "",
        "| run | flip | neurons | high quality | all, % of eligible | high quality, % of eligible |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["high_quality_comparison"]:
        cells = ("identified_neurons", "high_quality_neurons", "all_union_pct", "high_union_pct")
        lines.append(
            f"| {row['intervention']} | {row['metric']} | {' | '.join(cell_text(row[name], 1) for name in cells)} |"
        )
    return "\n".join([*lines, "", *content["notes"]]) + "\n"


# ---------------------------------------------------------------- figures


def draw_all(
    out_dir: Path, joined: pd.DataFrame, top: pd.DataFrame, sides: list[Side], quality: list[dict], layers: pd.DataFrame
) -> list[Path]:
    """Every figure for which there is something to draw."""
    labels = [side.label for side in sides]
    written: list[Path] = []
    for name in PLOTTED:
        columns = [f"baseline_{name}", f"candidate_{name}", f"paired_delta_{name}"]
        if any(column not in joined for column in columns):
            continue
        pairs = joined.loc[joined["status"] == "overlap", columns].dropna()
        if len(pairs) < 2:
            continue
        written += _draw(
            out_dir, f"scatter_{name}", pairs, partial(_scatter, pairs=pairs, name=name, labels=labels)
        )
        written += _draw(out_dir, f"delta_hist_{name}", pairs, partial(_histogram, pairs=pairs, name=name))
    if len(top) and "delta_flip_any_rate" in top:
        written += _draw(out_dir, "top_delta_flip_any_rate", top, lambda axes: _top(axes, top))
    rates = _global_rates(sides)
    if len(rates):
        written += _draw(out_dir, "global_unique_rates", rates, lambda axes: _bars(axes, rates, labels, "rows flipped"))
    frame = pd.DataFrame(quality)
    if len(frame):
        written += _overview(out_dir, frame, labels)
    if len(layers):
        written += _draw(out_dir, "hq_by_layer", layers, lambda axes: _by_layer(axes, layers, labels))
    return written


def _draw(out_dir: Path, name: str, data: pd.DataFrame, paint: Callable[[Any], None]) -> list[Path]:
    with report_style():
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        paint(figure.subplots())
        return save_figure(out_dir / f"{PREFIX}_{name}", figure, data)


def _scatter(axes: Any, pairs: pd.DataFrame, name: str, labels: list[str]) -> None:
    left, right = pairs.iloc[:, 0], pairs.iloc[:, 1]
    axes.scatter(left, right, s=18, alpha=0.7)
    limit = max(left.max(), right.max(), 1e-9) * 1.05
    axes.plot([0, limit], [0, limit], linestyle=":", color="grey")
    axes.set(xlabel=f"{labels[0]}: {name}", ylabel=f"{labels[1]}: {name}", title="neurons in both runs")


def _histogram(axes: Any, pairs: pd.DataFrame, name: str) -> None:
    axes.hist(pairs.iloc[:, 2], bins=min(30, max(5, len(pairs) // 2)))
    axes.axvline(0, color="grey", linestyle=":")
    axes.set(xlabel=f"change of {name}", ylabel="neurons")


def _top(axes: Any, top: pd.DataFrame) -> None:
    names = [f"{layer}:{index}" for layer, index in zip(top["layer_key"], top["neuron_id"], strict=True)]
    axes.barh(range(len(top)), top["delta_flip_any_rate"])
    axes.set_yticks(range(len(top)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set(xlabel="change of flip_any_rate (absent counts as 0)")


def _global_rates(sides: list[Side]) -> pd.DataFrame:
    rows = []
    for name in ("flip_any", "c2i", "i2c"):
        values = [(side.run.flip_global.value or {}).get(f"union_{name}_unique_rate") for side in sides]
        if all(isinstance(value, int | float) for value in values):
            rows.append((name, *values))
    return pd.DataFrame(rows, columns=["name", "first", "second"])


def _bars(axes: Any, data: pd.DataFrame, labels: list[str], y_label: str) -> None:
    """Two bars per row of `data` (name, first, second)."""
    for number, (column, label) in enumerate(zip(("first", "second"), labels, strict=True)):
        places = [place + 0.4 * number - 0.2 for place in range(len(data))]
        values = data[column].astype(float)
        axes.bar(places, values, width=0.38, label=label)
        for place, value in zip(places, values, strict=True):
            if math.isnan(value):
                axes.text(place, 0, "NA", ha="center", va="bottom")
    axes.set_xticks(range(len(data)), data["name"])
    axes.set(ylabel=y_label, xlim=(-0.8, len(data) - 0.2))
    # Room for the legend above the bars.
    axes.margins(y=0.25)
    axes.legend(loc="upper right", ncols=2)


def _overview(out_dir: Path, quality: pd.DataFrame, labels: list[str]) -> list[Path]:
    """Two by two: neuron counts, share of high quality, coverage of all and of high-quality neurons."""
    pairs = {label: quality[quality["intervention"] == label].reset_index(drop=True) for label in labels}
    first, second = pairs[labels[0]], pairs[labels[-1]]

    def two(names: list[str], columns: list[str]) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "name": names,
                "first": [first.loc[0, column] for column in columns],
                "second": [second.loc[0, column] for column in columns],
            }
        )

    def by_metric(column: str) -> pd.DataFrame:
        return pd.DataFrame({"name": first["metric"], "first": first[column], "second": second[column]})

    with report_style():
        figure = Figure(figsize=(10.0, 7.0), layout="constrained")
        grid = figure.subplots(2, 2).ravel()
        _bars(
            grid[0],
            two(["identified", "high quality"], ["identified_neurons", "high_quality_neurons"]),
            labels,
            "neurons",
        )
        _bars(grid[1], two(["high quality"], ["high_quality_fraction"]), labels, "share of neurons")
        _bars(grid[2], by_metric("all_union_pct"), labels, "% of eligible rows, all neurons")
        _bars(grid[3], by_metric("high_union_pct"), labels, "% of eligible rows, high quality")
        return save_figure(out_dir / f"{PREFIX}_hq_overview", figure, quality)


def _by_layer(axes: Any, layers: pd.DataFrame, labels: list[str]) -> None:
    names = list(dict.fromkeys(layers.sort_values("layer_sort", kind="stable")["layer_key"]))
    for label in labels:
        rows = layers[layers["intervention"] == label].set_index("layer_key").reindex(names)
        high, everyone = (rows[f"flip_any_{who}_union_pct"].astype(float) for who in ("high", "all"))
        (line,) = axes.plot(names, high, marker="o", label=f"{label}, high quality")
        axes.plot(names, everyone, marker=".", linestyle=":", color=line.get_color(), label=f"{label}, all")
    axes.set(xlabel="layer", ylabel="% of evaluated rows flipped")
    axes.tick_params(axis="x", labelsize=6, rotation=90)
    axes.legend()
