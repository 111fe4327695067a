"""Which prompts stage 7 evaluates, and what each of them may be used for."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import Enum

import numpy as np

from lib.cli import UserError
from lib.scores_table import ScoresTable

MAX_SHARE_GIVEN_UP = 0.2
"""Share of the fitting rows that may be given up to keep variants of one prompt on one side."""


class Role(Enum):
    """What a row may be used for."""

    DISCOVERY = "discovery"
    """Helped to find the neurons: may help to choose a rule, never to judge it."""
    TRAIN = "train"
    """Chooses rules."""
    TEST = "test"
    """Held out by stage 2 and untouched since: judges frozen rules, once."""
    VARIANT = "variant"
    """A variant of a prompt on the other side: used for neither."""


class RowSampling(Enum):
    """How the evaluated rows are chosen."""

    ALL = "all"
    """Every row."""
    STRATIFIED = "stratified"
    """At most `--sampling_max_points`, with small classes (split x baseline) protected."""
    SPECTRAL = "spectral"
    """As stratified, and inside each class spread over clusters of the prompts' representations."""


@dataclass(frozen=True)
class EvaluatedRows:
    """The chosen rows: their numbers in `scores.csv` (ascending) and their roles, both [row]."""

    rows: np.ndarray
    roles: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def has_role(self, *roles: Role) -> np.ndarray:
        """Boolean mask [row] of the rows with one of the roles."""
        return np.isin(self.roles, [role.value for role in roles])

    @property
    def is_test(self) -> np.ndarray:
        """Mask of the rows that judge rules."""
        return self.has_role(Role.TEST)

    def is_fit(self, *, with_discovery: bool) -> np.ndarray:
        """Mask of the rows that choose rules."""
        return self.has_role(Role.TRAIN, Role.DISCOVERY) if with_discovery else self.has_role(Role.TRAIN)

    def counts(self) -> dict[str, int]:
        """Number of rows per role."""
        return {role.value: int(self.has_role(role).sum()) for role in Role}

    def take(self, mask: np.ndarray) -> EvaluatedRows:
        """The rows where the mask [row] is True."""
        return EvaluatedRows(self.rows[mask], self.roles[mask])


def assign_roles(
    table: ScoresTable, discovery: np.ndarray, groups: np.ndarray | None, order: np.random.Generator
) -> np.ndarray:
    """Role of every row of the table, [row] of text.

    groups: [row] group numbers of prompts that are variants of one source, or None. A group on both sides of the split
    goes to one side as a whole and its rows of the other side become VARIANT: to TEST in random order until a fifth of
    the fitting rows is given up, the remaining ones (and all with a discovery row) to TRAIN.
    """
    roles = np.where(table.is_test, Role.TEST.value, Role.TRAIN.value).astype(object)
    roles[discovery] = Role.DISCOVERY.value
    if groups is None:
        return roles
    members: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(groups.tolist()):
        members[group].append(row)
    mixed = [
        np.array(rows)
        for _, rows in sorted(members.items())
        if len(set(roles[rows]) & {"test"}) and set(roles[rows]) != {"test"}
    ]
    allowance = MAX_SHARE_GIVEN_UP * (roles == Role.TRAIN.value).sum()
    for position in order.permutation(len(mixed)):
        rows = mixed[position]
        n_given_up = int((roles[rows] == Role.TRAIN.value).sum())
        to_test = Role.DISCOVERY.value not in roles[rows] and n_given_up <= allowance
        loser = Role.TRAIN.value if to_test else Role.TEST.value
        allowance -= n_given_up if to_test else 0
        roles[rows[roles[rows] == loser]] = Role.VARIANT.value
    return roles


def group_numbers(table: ScoresTable, group_col: str) -> np.ndarray:
    """Group of each row, [row] int: equal values of a column, or of several (comma list) as an unordered set.

    `operand_a,operand_b,operator` thus keeps 2+3 and 3+2 together.
    """
    names = [name.strip() for name in group_col.split(",") if name.strip()]
    missing = [name for name in names if name not in table.frame.columns]
    if missing or not names:
        raise UserError(f"--group_col: {table.path} has no column {', '.join(missing) or repr(group_col)}")
    keys = [tuple(sorted(map(str, values))) for values in table.frame[names].itertuples(index=False, name=None)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


def stratified_sample(
    strata: np.ndarray, n_rows: int, random: np.random.Generator, clusters: np.ndarray | None = None
) -> np.ndarray:
    """At most `n_rows` positions, ascending: half shared out evenly over the strata, half in proportion to their sizes.

    strata: [row] labels. clusters: [row] numbers; inside a stratum every cluster gets its share.
    """
    if n_rows >= len(strata):
        return np.arange(len(strata))
    names, sizes = np.unique(strata, return_counts=True)
    even = np.minimum(sizes, n_rows // (2 * len(names)))
    quotas = even + _proportional(sizes - even, n_rows - int(even.sum()))
    chosen = []
    for name, quota in zip(names, quotas, strict=True):
        members = np.flatnonzero(strata == name)
        chosen.append(_spread(members, None if clusters is None else clusters[members], int(quota), random))
    return np.sort(np.concatenate(chosen))


def _spread(members: np.ndarray, clusters: np.ndarray | None, quota: int, random: np.random.Generator) -> np.ndarray:
    """`quota` of the members at random, from each cluster in proportion to its size."""
    if clusters is None:
        return random.choice(members, quota, replace=False)
    names, sizes = np.unique(clusters, return_counts=True)
    shares = _proportional(sizes, quota)
    return np.concatenate(
        [
            random.choice(members[clusters == name], int(share), replace=False)
            for name, share in zip(names, shares, strict=True)
        ]
    )


def _proportional(sizes: np.ndarray, total: int) -> np.ndarray:
    """Share `total` out in proportion to sizes, never more than a size: largest remainders first."""
    if sizes.sum() <= total:
        return sizes.astype(int)
    exact = sizes * (total / sizes.sum())
    quotas = np.floor(exact).astype(int)
    missing = total - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    return quotas


def choose_rows(
    table: ScoresTable,
    roles: np.ndarray,
    *,
    max_points: int | None,
    random: np.random.Generator,
    clusters: np.ndarray | None = None,
) -> EvaluatedRows:
    """All usable rows, or a stratified sample of at most `max_points`, with their roles.

    Rows without a label, and VARIANT rows, are never evaluated. Strata are (held out, baseline label).
    """
    labelled = table.frame[table.primary_target].notna().to_numpy()
    usable = np.flatnonzero(labelled & (roles != Role.VARIANT.value))
    if max_points is not None and max_points < len(usable):
        strata = np.char.add(
            np.where(roles[usable] == Role.TEST.value, "test", "fit").astype(str),
            np.where(table.target(rows=usable), "+", "-").astype(str),
        )
        usable = usable[stratified_sample(strata, max_points, random, None if clusters is None else clusters[usable])]
    return EvaluatedRows(usable, roles[usable])
