"""Stage 2: from labelled answers to one table of features; the hold-out comes first, filters see TRAIN only."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.artifacts import StageRecord, exclusive
from lib.cli import Report, UserError, rng
from lib.feature_files import FeatureTable, write_outputs
from lib.feature_filters import FeatureMetrics, FilterOptions, feature_metrics, filter_features
from lib.feature_proposals import ProposalOptions, Proposals
from lib.feature_representation import MISSING_VALUE, assign_columns
from lib.feature_rows import OWN_COLUMNS, group_keys, label_codes, prepare_rows
from lib.feature_sandbox import FeatureSandbox, SandboxChain, with_fallback
from lib.feature_scoring import N_TRIED_ROWS, ScoredFeatures, sandbox_rows, score_proposals, score_seeds
from lib.feature_split import Split, split_rows
from lib.stages.behaviour import CACHE, read_dataset, recorded_task
from lib.task_spec import FeatureTaskSpec, write_task_settings

STAGE = "2_generate_features"


def run_stage_2(args: argparse.Namespace, report: Report) -> None:
    """Make `scores.csv`, `features.json` and what explains them, unless matching ones are there."""
    folder, cache_path = Path(args.features_scores_dir), Path(args.prompts_answers_pkl_file)
    task = recorded_task(args.task_module, cache_path)
    options = filter_options(args)
    record = StageRecord(STAGE, _settings(args, task, options), {CACHE: cache_path},
                         folder / "run_metadata.json")
    if record.is_complete() and not args.force:
        report.line(f"stage 2 is up to date: {folder}")
        _tell(record.summary(), report)
        return
    with exclusive(folder):
        summary = _make_table(args, task, options, record, report)
    _tell(summary, report)


def _make_table(args: argparse.Namespace, task: FeatureTaskSpec, options: FilterOptions, record: StageRecord,
                report: Report) -> dict[str, Any]:
    """Score, split, filter, write; the summary."""
    started = time.time()
    folder = Path(args.features_scores_dir)
    frame = read_dataset(Path(args.prompts_answers_pkl_file), task)
    frame = prepare_rows(frame, task, args.max_number_of_prompts_to_analyze, args.seed)
    scored = score_seeds(frame, task, report)
    split = split_rows(scored.values, label_codes(frame, task), group_keys(frame, task), args.seed)
    proposals = Proposals()
    if not args.no_llm:
        proposals, scored = add_proposals(args, frame, task, split, scored, report)
    if not scored.features:
        raise UserError(f"no features: the task {task.NAME} has none of its own, and none was proposed")
    metrics = train_metrics(scored, frame, task, split, args.train_ratio, args.seed)
    result = filter_features(scored.values[~split.is_test], metrics, options)
    columns = assign_columns([feature.label for feature in scored.features], [*frame.columns, *OWN_COLUMNS])
    table = FeatureTable(frame, scored, columns, split, metrics, result, proposals)
    outputs = write_outputs(folder, table, task, plots=not args.no_plots)
    outputs.append(write_task_settings(folder, args.task_module, task))
    summary = {"n_rows": len(frame), "n_candidates": len(scored.features), "n_features": int(result.keep.sum()),
               "n_proposed": len(proposals.features), "n_rejected_proposals": len(table.rejected_proposals),
               "split": split.to_json(), "notes": proposals.notes + result.notes + _absent_classes(frame, task, split)}
    record.finish(outputs, started=started, summary=summary)
    return summary


def _settings(args: argparse.Namespace, task: FeatureTaskSpec, options: FilterOptions) -> dict[str, Any]:
    """What decides the result."""
    settings = {"task_module": args.task_module, "task_settings": task.settings.identity(), "seed": args.seed,
                "filters": asdict(options), "train_ratio": args.train_ratio, "plots": not args.no_plots,
                "max_prompts": args.max_number_of_prompts_to_analyze, "missing_value": MISSING_VALUE, "llm": None}
    if not args.no_llm:
        settings["llm"] = {"ai_model": args.ai_model, "base_url": args.base_url, "sandbox": args.feature_sandbox,
                           **asdict(proposal_options(args))}
    return settings


def filter_options(args: argparse.Namespace) -> FilterOptions:
    """The filters that the flags ask for."""
    return FilterOptions(
        drop_high_variance=args.drop_high_mad_variance_features, z_threshold=args.z_thresh,
        drop_low_power=args.drop_low_predictive_power_features, min_auc=args.min_auc, min_delta=args.min_delta,
        min_ap_above_base=args.min_ap_above_base, drop_near_duplicates=args.drop_near_duplicate_features,
        correlation_threshold=args.near_duplicate_features_threshold)


def proposal_options(args: argparse.Namespace) -> ProposalOptions:
    """How the flags ask for proposals."""
    return ProposalOptions(
        n_features=args.n_features, n_rounds=args.feature_extraction_steps,
        n_positive=args.num_correct_example_prompts, n_negative=args.num_incorrect_example_prompts,
        n_shown_for_diversity=args.number_of_existing_features_to_show_for_diversity, temperature=args.temperature)


def _absent_classes(frame: pd.DataFrame, task: FeatureTaskSpec, split: Split) -> list[str]:
    """A note per class without a TRAIN row: features and rules then have nothing to tell apart."""
    labels = label_codes(frame, task)[~split.is_test]
    return [f"no TRAIN row is {name}: there is nothing to tell apart" for code, name
            in ((1, f"positive ({task.POSITIVE_NAME})"), (0, f"negative ({task.NEGATIVE_NAME})"))
            if not (labels == code).any()]


def _tell(summary: Mapping[str, Any], report: Report) -> None:
    split = summary["split"]
    report.line(f"{summary['n_rows']} prompts, {split['n_test']} of them held out ({split['n_clusters']} clusters); "
                f"{summary['n_features']} of {summary['n_candidates']} features kept")
    if summary["n_proposed"] or summary["n_rejected_proposals"]:
        report.line(f"{summary['n_proposed']} features proposed, {summary['n_rejected_proposals']} more rejected")
    for note in summary["notes"]:
        report.line(f"note: {note}")


# ---------------------------------------------------------------- proposed features

def add_proposals(args: argparse.Namespace, frame: pd.DataFrame, task: FeatureTaskSpec, split: Split,
                  seeds: ScoredFeatures, report: Report) -> tuple[Proposals, ScoredFeatures]:
    """Ask the feature model, showing it TRAIN rows only, and score what it proposes on every row."""
    from lib.caching_and_prompting import ChatClient, resolve_chat_model
    from lib.feature_proposals import propose

    labels = label_codes(frame, task)
    prompts = frame[task.DEFAULT_INPUT]
    train_rows = np.flatnonzero(~split.is_test)
    tried = rng(args.seed, "stage2", "tried_rows").permutation(train_rows)
    with ExitStack() as stack:
        sandbox = _open_sandbox(args.feature_sandbox, stack)
        client = stack.enter_context(ChatClient(resolve_chat_model(args.ai_model, args.base_url), args.cache_dir))
        some_rows = sandbox_rows(frame.iloc[np.sort(tried[:N_TRIED_ROWS])], task)
        positive, negative = (prompts[~split.is_test & (labels == code)].tolist() for code in (1, 0))
        report.line(f"TRAIN prompts are shown to {client.model}")
        proposals = propose(
            client, task, positive, negative, seeds.features,
            lambda feature: sandbox.evaluate(feature.python_src, some_rows).rejection, proposal_options(args),
            args.seed, report)
        if not proposals.features:
            return proposals, seeds
        scored = score_proposals(proposals.features, sandbox_rows(frame, task), sandbox, os.cpu_count() or 1, report)
    return proposals, seeds.joined(scored) if seeds.features else scored


def _open_sandbox(choice: str, stack: ExitStack) -> SandboxChain:
    """The sandbox of `--feature_sandbox`: auto, monty or wasm."""
    monty, wasm = with_fallback()
    if choice == "wasm" and wasm is None:
        raise UserError("--feature_sandbox wasm: the WebAssembly interpreter is not installed; run: bash setup.sh")
    first: FeatureSandbox = wasm if choice == "wasm" and wasm is not None else monty
    stack.enter_context(first)
    second = wasm if choice == "auto" else None
    if second is not None:
        stack.enter_context(second)
    return SandboxChain(first, second)


# ---------------------------------------------------------------- metrics

def train_metrics(scored: ScoredFeatures, frame: pd.DataFrame, task: FeatureTaskSpec, split: Split, train_ratio: float,
                  seed: int) -> FeatureMetrics:
    """Metrics on the labelled TRAIN rows, or on a random `train_ratio` of them (0 or at least 1: all)."""
    labels = label_codes(frame, task)
    rows = np.flatnonzero(~split.is_test & (labels < 2))
    if 0 < train_ratio < 1:
        order = np.lexsort((rng(seed, "stage2", "train_ratio").random(len(rows)), labels[rows]))
        n_picked = max(1, round(train_ratio * len(rows)))
        rows = np.sort(rows[order[(np.arange(n_picked) * len(rows)) // n_picked]])
    return feature_metrics(scored.values[rows], labels[rows] == 1)
