"""Which pairs of datapoints stage 5 contrasts: one job per rule (from a plan or drawn at random) or per cluster."""

from __future__ import annotations

import argparse
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lib import spectral_analysis as spectral
from lib.artifacts import expecting, file_digest, read_json
from lib.cli import UserError, rng
from lib.pairing import pair_by_similarity, pairing_report
from lib.scores_table import ScoresTable
from lib.stages.prompt_space import PromptSpace
from lib.text_and_rules import StoredRule


@dataclass(frozen=True)
class PairJob:
    """A contrast to explain: rows of scores.csv on which it holds (clean), each with one on which it does not.

    circuit_id: rule id or cluster number. skip_reason: set when there is nothing to study. members: all rows of a
    cluster, in cluster mode.
    """

    circuit_id: int
    label: str
    folder: str
    sampling_strategy: str
    clean_rows: np.ndarray
    corrupted_rows: np.ndarray
    n_pos: int
    n_neg: int
    coefficient_sign: str | None = None
    skip_reason: str | None = None
    pairing_meta: dict[str, Any] | None = None
    members: np.ndarray | None = field(default=None)

    @property
    def n_pairs(self) -> int:
        """Number of pairs."""
        return len(self.clean_rows)


def slug(text: str) -> str:
    """Folder name of a rule: lower case, other characters than letters and digits as `-`, at most 64 of them."""
    return (re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "rule")[:64]


def rule_folder(target: str, rule: StoredRule) -> str:
    """Folder of a rule's results below the output folder."""
    return f"{target}/rule_{rule.rule_id}_{slug(rule.text)}"


def plan_jobs(path: Path, rules: Sequence[StoredRule], space: PromptSpace, args: argparse.Namespace) -> list[PairJob]:
    """One job per rule, with the first `--max_pairs_per_circuit` pairs that the sampling plan lists for it.

    Raises:
        UserError: the plan belongs to other data, another model, another subset, or other rules.
    """
    plan = read_json(path, "sampling plan (stage 4)")
    table = space.table
    all_rows = table.subset_rows("all")
    with expecting("a sampling plan of stage 4", path):
        check_plan(plan, path, table, all_rows, args.ai_model)
        entries = {(entry["rule_target"], entry["rule_id"]): entry for entry in plan["rules"]}
        return [
            _plan_job(entries.get((table.primary_target, rule.rule_id)), rule, path, all_rows, space, args)
            for rule in rules
        ]


def check_plan(plan: dict[str, Any], path: Path, table: ScoresTable, rows: np.ndarray, ai_model: str) -> None:
    """Refuse a plan that belongs to other data. Published plans hold no digest of the table: there its size decides."""
    if plan["baseline_subset"] != "all":
        subset = plan["baseline_subset"]
        raise UserError(f"{path} samples the subset {subset!r}; stage 5 needs a plan made with --baseline_subset all")
    if plan["dataset_size"] != len(rows):
        raise UserError(
            f"{path} was made for {plan['dataset_size']} TRAIN rows, {table.path} has {len(rows)}; run stage 4 again"
        )
    if plan.get("scores_sha256") not in (None, file_digest(table.path)):
        raise UserError(f"{path} was made from other contents of {table.path}; run stage 4 again")
    if plan.get("ai_model", ai_model) != ai_model:
        raise UserError(f"{path} was made for the model {plan['ai_model']}, not {ai_model}; run stage 4 again")


def _plan_job(
    entry: dict[str, Any] | None,
    rule: StoredRule,
    path: Path,
    all_rows: np.ndarray,
    space: PromptSpace,
    args: argparse.Namespace,
) -> PairJob:
    if entry is None or entry.get("rule") != rule.text:
        raise UserError(f"{path} has no entry for rule {rule.rule_id} ({rule.text}); run stage 4 again")
    names = ("associated_indices", "unrelated_indices")
    associated, unrelated = (list(map(operator.index, entry[name])) for name in names)
    if len(associated) != len(unrelated) or any(not 0 <= i < len(all_rows) for i in [*associated, *unrelated]):
        raise UserError(f"{path}: the indices of rule {rule.rule_id} are not pairs of TRAIN rows; run stage 4 again")
    reason = entry.get("reason", "skipped in the sampling plan") if entry["status"] != "ok" else None
    keep = slice(0, args.max_pairs_per_circuit)
    return PairJob(
        rule.rule_id,
        rule.text,
        rule_folder(space.table.primary_target, rule),
        "plan",
        all_rows[np.array(associated[keep], dtype=np.int64)],
        all_rows[np.array(unrelated[keep], dtype=np.int64)],
        entry["n_associated_available"],
        entry["n_unrelated_available"],
        rule.direction,
        reason,
        entry.get("pairing_meta"),
    )


def random_jobs(rules: Sequence[StoredRule], space: PromptSpace, args: argparse.Namespace) -> list[PairJob]:
    """One job per rule: associated rows drawn at random, each with a similar unrelated row of equal length."""
    rows = space.table.subset_rows("all")
    frame = space.table.frame.iloc[rows]
    jobs = []
    for rule in rules:
        mask = rule.mask(frame)
        generator = rng(args.seed, "stage5", "random", rule.rule_id)
        folder = rule_folder(space.table.primary_target, rule)
        jobs.append(_drawn_job(rule, folder, rows[mask], rows[~mask], generator, space, args))
    return jobs


def _drawn_job(
    rule: StoredRule,
    folder: str,
    associated: np.ndarray,
    unrelated: np.ndarray,
    generator: np.random.Generator,
    space: PromptSpace,
    args: argparse.Namespace,
) -> PairJob:
    n_pairs = min(args.max_pairs_per_circuit, len(associated), len(unrelated))
    reason, meta = too_few(n_pairs, args), None
    clean = corrupted = np.array([], dtype=np.int64)
    if reason is None:
        clean = np.sort(generator.choice(associated, n_pairs, replace=False))
        corrupted, meta = partners(clean, unrelated, space, args)
    return PairJob(
        rule.rule_id,
        rule.text,
        folder,
        "random",
        clean,
        corrupted,
        len(associated),
        len(unrelated),
        rule.direction,
        reason,
        meta,
    )


def cluster_jobs(space: PromptSpace, args: argparse.Namespace) -> list[PairJob]:
    """One job per k-centre cluster of the base subset: a covering sample of its members against other TRAIN rows."""
    table = space.table
    rows, train = table.subset_rows(args.cluster_base_subset), table.subset_rows("all")
    if len(rows) < 2:
        raise UserError(f"{table.path} has {len(rows)} TRAIN rows in the subset {args.cluster_base_subset!r}; need 2")
    labels = ("stage5", "clusters", args.cluster_base_subset)
    points, _ = space.points(rows, rng(args.seed, *labels, "axes"))
    clusters = spectral.k_centre(points, args.global_n_clusters, rng(args.seed, *labels))
    jobs = []
    for number in range(len(clusters.centres)):
        group = np.flatnonzero(clusters.assignment == number)
        others = np.setdiff1d(train, rows[group])
        n_pairs = min(args.max_pairs_per_circuit, len(group), len(others))
        reason, meta = too_few(n_pairs, args), None
        clean = corrupted = np.array([], dtype=np.int64)
        if reason is None:
            clean = rows[spectral.cover_by_clusters(points, group, clusters, n_pairs).chosen]
            corrupted, meta = partners(clean, others, space, args)
        jobs.append(
            PairJob(
                number,
                f"spectral_cluster_{number}",
                f"spectral_clusters_{args.cluster_base_subset}/cluster_{number}",
                "spectral_clusters",
                clean,
                corrupted,
                len(group),
                len(others),
                skip_reason=reason,
                pairing_meta=meta,
                members=rows[group],
            )
        )
    return jobs


def too_few(n_pairs: int, args: argparse.Namespace) -> str | None:
    """Why a job is skipped, or None."""
    if n_pairs >= args.min_pairs_per_circuit:
        return None
    return f"only {n_pairs} pairs, fewer than --min_pairs_per_circuit {args.min_pairs_per_circuit}"


def partners(
    clean: np.ndarray, others: np.ndarray, space: PromptSpace, args: argparse.Namespace
) -> tuple[np.ndarray, dict[str, Any]]:
    """A similar row of equal length for each clean row, with the `pairing_meta` block; all are rows of scores.csv."""
    clean_lengths, other_lengths = space.lengths(clean), space.lengths(others)
    options = {
        "metric": args.pair_similarity_metric,
        "length_tolerance": 0,
        "max_target_uses": args.pair_max_target_uses,
    }
    pairing = pair_by_similarity(
        space.pairing_view(clean), space.pairing_view(others), clean_lengths, other_lengths, **options
    )
    chosen = others[pairing.targets]
    chosen_lengths = other_lengths.take(pairing.targets)
    meta = pairing_report(pairing, clean, chosen, clean_lengths, chosen_lengths, n_targets=len(others), **options)
    return chosen, meta
