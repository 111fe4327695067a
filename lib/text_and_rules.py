"""Rules as data: conditions on features, their conjunctions, and disjunctions of those, with one text form.

Rules are evaluated by numpy comparisons on columns; text is read by `lib.rule_parser`, never executed. A missing value
(NaN) satisfies no comparison, so `NOT(x > 1)` covers a row whose x is missing; tables are filled with 0 and False
before rules are made, so this matters for foreign tables only.
"""

from __future__ import annotations

import math
import operator as operators
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from lib.artifacts import read_csv, read_json
from lib.cli import UserError

if TYPE_CHECKING:
    import pandas as pd

    Columns: TypeAlias = Mapping[str, np.ndarray] | pd.DataFrame

COMPARISONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "<=": operators.le,
    ">": operators.gt,
    "<": operators.lt,
    ">=": operators.ge,
    "==": operators.eq,
    "!=": operators.ne,
}
KEYWORDS = frozenset({"and", "or", "not", "true", "false"})
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]*[A-Za-z_][A-Za-z0-9_.]*")
# Columns that hold the rule's text, by preference; `expression` is that of the rule_combo files.
TEXT_COLUMNS = ("rule", "string_rule", "rule_string", "expr", "rule_expression", "expression")
SCOPE_INFIXES = {"train": "", "test_selected": "test_selected_", "all_fit": "all_fit_"}


def number_text(value: float) -> str:
    """Shortest text that reads back as exactly `value`: `0.5`, `3`, `1e-07`."""
    return repr(float(value)).removesuffix(".0")


@dataclass(frozen=True)
class Condition:
    """One comparison of a feature with a number; `operator` is one of `COMPARISONS` (we write `<=` and `>` only)."""

    feature: str
    operator: str
    threshold: float

    def __post_init__(self) -> None:
        if self.operator not in COMPARISONS:
            raise ValueError(f"{self.operator!r} is no comparison")
        if not math.isfinite(self.threshold):
            raise ValueError(f"the threshold of {self.feature} is not finite: {self.threshold}")
        if not self.feature or "`" in self.feature:
            raise ValueError(f"{self.feature!r} cannot name a feature")
        object.__setattr__(self, "threshold", float(self.threshold) + 0.0)

    def covers(self, values: np.ndarray) -> np.ndarray:
        """Where the comparison holds, [row]; never where the value is missing."""
        fires = COMPARISONS[self.operator](values, self.threshold)
        return fires & ~np.isnan(values) if self.operator == "!=" else fires

    def text(self) -> str:
        """`feature <= 0.5`, every digit kept; unusual names are back-quoted."""
        return f"{_quoted(self.feature)} {self.operator} {number_text(self.threshold)}"


@dataclass(frozen=True)
class Conjunction:
    """All conditions hold; with `negated`, not all of them do. At least one condition."""

    conditions: tuple[Condition, ...]
    negated: bool = False

    def __post_init__(self) -> None:
        if not self.conditions:
            raise ValueError("a conjunction needs a condition")

    @property
    def features(self) -> tuple[str, ...]:
        """Features in order of first use."""
        return tuple(dict.fromkeys(condition.feature for condition in self.conditions))

    def covers(self, columns: Columns) -> np.ndarray:
        """Where the literal holds, [row]."""
        fires = np.logical_and.reduce(
            [condition.covers(_numbers(columns, condition.feature)) for condition in self.conditions]
        )
        return ~fires if self.negated else fires

    def text(self) -> str:
        """`a <= 0.5 & b > 3`, or `NOT(...)` of it."""
        inner = " & ".join(condition.text() for condition in self.conditions)
        return f"NOT({inner})" if self.negated else inner

    def display(self, columns: Columns | None = None) -> str:
        """Text for people: intervals as `3 < a <= 5`, thresholds rounded (see `rounded_threshold`)."""
        lower = {c.feature: c for c in self.conditions if c.operator in (">", ">=")}
        upper = {c.feature: c for c in self.conditions if c.operator in ("<=", "<")}
        shown = []
        for condition in self.conditions:
            name = condition.feature
            number = _display_number(condition, columns)
            if lower.get(name) is condition and name in upper:
                sign = "<" if condition.operator == ">" else "<="
                shown.append(
                    f"{number} {sign} {_quoted(name)} {upper[name].operator} {_display_number(upper[name], columns)}"
                )
            elif upper.get(name) is not condition or name not in lower:
                shown.append(f"{_quoted(name)} {condition.operator} {number}")
        inner = " & ".join(shown)
        return f"NOT({inner})" if self.negated else inner

    def simplified(self) -> Conjunction | None:
        """The same rows with the fewest conditions, lower bound before upper; None if no value satisfies them all."""
        tightest: dict[tuple[str, str], Condition] = {}
        for condition in self.conditions:
            key = (condition.feature, _SIDE.get(condition.operator, condition.text()))
            held = tightest.get(key)
            tightest[key] = condition if held is None or _tighter(condition, held) else held
        kept = []
        for feature in self.features:
            low, high = tightest.get((feature, "lower")), tightest.get((feature, "upper"))
            if low and high and _is_empty(low, high):
                return None
            kept += [bound for bound in (low, high) if bound]
            kept += [c for (name, side), c in tightest.items() if name == feature and side not in ("lower", "upper")]
        return Conjunction(tuple(kept), self.negated)


@dataclass(frozen=True)
class Rule:
    """At least one literal holds; no literal at all is FALSE, the rule that covers nothing."""

    literals: tuple[Conjunction, ...] = ()

    @property
    def features(self) -> tuple[str, ...]:
        """Features in order of first use."""
        return tuple(dict.fromkeys(name for literal in self.literals for name in literal.features))

    @property
    def n_literals(self) -> int:
        """Number of disjuncts."""
        return len(self.literals)

    @property
    def n_conditions(self) -> int:
        """Number of comparisons over all literals."""
        return sum(len(literal.conditions) for literal in self.literals)

    def covers(self, columns: Columns) -> np.ndarray:
        """Where the rule holds, [row].

        Raises:
            UserError: a feature is missing from `columns` or is not numeric.
        """
        fires = np.zeros(_n_rows(columns), dtype=bool)
        for literal in self.literals:
            fires |= literal.covers(columns)
        return fires

    def text(self) -> str:
        """Machine text, all digits: `(a > 0.5 & b <= 3) OR (NOT(c > 1))`, or `FALSE`."""
        return " OR ".join(f"({literal.text()})" for literal in self.literals) or "FALSE"

    def display(self, columns: Columns | None = None) -> str:
        """Text for people; with `columns`, each threshold is rounded as far as it still parts the same seen values."""
        if self.n_literals == 1:
            return self.literals[0].display(columns)
        return " OR ".join(f"({literal.display(columns)})" for literal in self.literals) or "no rule"

    def simplified(self) -> Rule:
        """The same rows without impossible, repeated or contained literals (missing values aside, see the module)."""
        literals: list[Conjunction] = []
        for literal in self.literals:
            simple = literal.simplified()
            if simple is not None:
                literals.append(simple)
            elif literal.negated:  # NOT(impossible) is always true: kept as written, there is no shorter text for it
                literals.append(literal)
        kept: list[Conjunction] = []
        for literal in literals:
            if not any(_contains(other, literal) for other in kept):
                kept = [other for other in kept if not _contains(literal, other)] + [literal]
        return Rule(tuple(kept))


def rounded_threshold(threshold: float, seen: np.ndarray | None = None) -> str:
    """Shortest decimal that parts the seen values as `threshold` does; without seen values, four significant digits."""
    if seen is None:
        return number_text(float(f"{threshold:.4g}"))
    seen = seen[np.isfinite(seen)]
    low = seen[seen <= threshold].max(initial=-np.inf)
    high = seen[seen > threshold].min(initial=np.inf)
    on_value = bool(low == threshold)
    for digits in range(1, 17):
        value = float(f"{threshold:.{digits}g}")
        if value == threshold or (low < value < high and not on_value):
            return number_text(value)
    return number_text(threshold)


_SIDE = {">": "lower", ">=": "lower", "<=": "upper", "<": "upper"}


def _tighter(condition: Condition, than: Condition) -> bool:
    """Whether a bound on the same side admits fewer values."""
    if condition.threshold == than.threshold:
        return condition.operator in (">", "<") and than.operator in (">=", "<=")
    return (condition.threshold > than.threshold) == (_SIDE.get(condition.operator) == "lower")


def _is_empty(low: Condition, high: Condition) -> bool:
    if low.threshold == high.threshold:
        return not (low.operator == ">=" and high.operator == "<=")
    return low.threshold > high.threshold


def _contains(outer: Conjunction, inner: Conjunction) -> bool:
    """Whether `outer` certainly covers every row of `inner` (compares bounds, so it may miss a containment)."""
    if outer.negated or inner.negated:
        return outer == inner
    return all(
        any(
            held == condition
            or (
                held.feature == condition.feature
                and held.operator in _SIDE
                and _SIDE.get(held.operator) == _SIDE.get(condition.operator)
                and _tighter(held, condition)
            )
            for held in inner.conditions
        )
        for condition in outer.conditions
    )


def _quoted(name: str) -> str:
    return name if PLAIN_NAME.fullmatch(name) and name.lower() not in KEYWORDS else f"`{name}`"


def _display_number(condition: Condition, columns: Columns | None) -> str:
    seen = None if columns is None else _numbers(columns, condition.feature)
    return rounded_threshold(condition.threshold, seen)


def _n_rows(columns: Columns) -> int:
    if hasattr(columns, "index"):
        return len(columns)
    return len(next(iter(columns.values()))) if columns else 0


def _numbers(columns: Columns, feature: str) -> np.ndarray:
    """A column as float64 [row]; True/False count as 1/0, missing as NaN."""
    if feature not in columns:
        raise UserError(
            f"the rule uses the feature {feature!r}, which the table does not have; run stages 2 and 3 again"
        )
    try:
        return np.asarray(columns[feature], dtype=float)
    except (TypeError, ValueError):
        raise UserError(f"the rule compares the column {feature!r} with a number, but it holds text") from None


def parse_rule(text: str) -> Rule:
    """Read a rule in our or the published grammar (`&`, `AND`, `|`, `OR`, `~`, `NOT(...)`, `3 < a <= 5`).

    Raises:
        UserError: anything else; nothing of the text is ever run.
    """
    from lib.rule_parser import read_rule

    return read_rule(text)


# ---------------------------------------------------------------- rule files


@dataclass(frozen=True)
class StoredRule:
    """One row of a rule file. `rule_id` is its row number; `direction` "negative" means the rule speaks against."""

    rule_id: int
    rule: Rule
    text: str
    direction: str = "positive"

    def mask(self, columns: Columns) -> np.ndarray:
        """Rows for which the stored rule speaks, direction applied, [row]."""
        fires = self.rule.covers(columns)
        return fires if self.direction == "positive" else ~fires


def rule_file_path(
    rules_dir: str | Path, target: str, *, scope: str = "train", prefix: str = "optimal_rule_set"
) -> Path:
    """`<rules_dir>/<prefix>_<target>.csv`, with the scope's infix before the target; never a pattern."""
    if scope not in SCOPE_INFIXES:
        raise UserError(f"{scope!r} is no rule scope; choose from {', '.join(SCOPE_INFIXES)}")
    return Path(rules_dir) / f"{prefix}_{SCOPE_INFIXES[scope]}{target}.csv"


def load_rules(
    rules_dir: str | Path, target: str, *, scope: str = "train", prefix: str = "optimal_rule_set"
) -> list[StoredRule]:
    """The rules of one target and scope, in file order.

    Raises:
        UserError: no such file, no rule in it, or a text that is not a rule.
    """
    path = rule_file_path(rules_dir, target, scope=scope, prefix=prefix)
    if not path.is_file():
        raise UserError(f"no rules for {target}: {path} is not there; run stage 3 with --rules_dir {rules_dir}")
    rules = read_rule_file(path)
    if not rules:
        raise UserError(f"{path} holds no rule: stage 3 found none better than chance for {target}")
    return rules


def read_rule_file(path: str | Path) -> list[StoredRule]:
    """All rules of a CSV or JSON rule file, ours or a published one."""
    path = Path(path)
    if path.suffix == ".json":
        content = read_json(path, "rule file")
        rows = content.get("rules") if isinstance(content, dict) else content
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path} is not a list of rules")
    else:
        frame = read_csv(path, "rule file", keep_default_na=False, dtype=str)
        rows = frame.to_dict("records")
        if not rows and not any(name in frame.columns for name in TEXT_COLUMNS):
            raise UserError(f"{path} has no column with rules (one of {', '.join(TEXT_COLUMNS)})")
    return [_stored_rule(row, position, path) for position, row in enumerate(rows)]


def _stored_rule(row: Mapping[str, object], position: int, path: Path) -> StoredRule:
    name = next((name for name in TEXT_COLUMNS if name in row), None)
    where = f"row {position} of {path}"
    if name is None:
        raise UserError(f"{where} has no column with a rule (one of {', '.join(TEXT_COLUMNS)})")
    if str(row.get("component_type") or "rule").lower() != "rule":
        raise UserError(f"{where} is a {row['component_type']} term, not a rule; use a rule file without such rows")
    direction = str(row.get("coefficient_sign") or "positive").lower()
    if direction not in ("positive", "negative"):
        raise UserError(f"{where} has the coefficient_sign {direction!r}; positive or negative is needed")
    text = str(row[name])
    try:
        return StoredRule(int(float(str(row.get("rule_id") or position))), parse_rule(text), text, direction)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (ValueError, OverflowError):
        raise UserError(f"{where} has the rule_id {row['rule_id']!r}, which is not a number") from None


def find_rule_files(rules_dir: str | Path, prefix: str = "optimal_rule_set") -> Iterable[tuple[str, Path]]:
    """(target with any scope infix, path) of each `<prefix>_*.csv`, sorted."""
    paths = sorted(Path(rules_dir).glob(f"{prefix}_*.csv"))
    return [(path.stem.removeprefix(f"{prefix}_"), path) for path in paths]
