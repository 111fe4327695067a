"""Which rows chose a rule and which rows score it: the three scopes of the rule tables."""

from __future__ import annotations

import re
from enum import Enum

from lib.cli import UserError


class Scope(Enum):
    """What a rule's score is worth."""

    TEST = "test"
    """Chosen on TRAIN, frozen, scored on held-out rows: the strict estimate of generalisation."""

    TEST_SELECTED = "test_selected"
    """Chosen and scored on TEST: optimistic. Only on request, for comparison with published numbers."""

    ALL_FIT = "all_fit"
    """Chosen and scored on all evaluated rows: descriptive."""

    @property
    def slug(self) -> str:
        """Spelling in file names and columns."""
        return self.value

    @property
    def label(self) -> str:
        """Spelling in tables and figures."""
        return _LABELS[self]

    @property
    def published_label(self) -> str:
        """Column name of published tables."""
        return _PUBLISHED_LABELS[self]

    @property
    def meaning(self) -> str:
        """One line for captions and notes."""
        return _MEANINGS[self]

    @property
    def needs_manifest(self) -> bool:
        """Whether a published run's files count only beside a manifest of the known signature."""
        return self is not Scope.TEST

    @classmethod
    def parse(cls, text: str) -> Scope:
        """A scope from its name or an alias, whatever the case, dashes, underscores and spaces."""
        squeezed = re.sub(r"[-_\s]+", "", text).lower()
        for scope, names in _ALIASES.items():
            if squeezed in names:
                return scope
        raise UserError(f"{text!r} is not a score scope; choose from {', '.join(scope.value for scope in cls)}")


_LABELS = {
    Scope.TEST: "HQ(TEST)",
    Scope.TEST_SELECTED: "HQ(selected on TEST)",
    Scope.ALL_FIT: "HQ(ALL-FIT)",
}
_PUBLISHED_LABELS = {Scope.TEST: "HQ legacy-test", Scope.TEST_SELECTED: "HQ-T", Scope.ALL_FIT: "HQ-F"}
_MEANINGS = {
    Scope.TEST: "chosen on TRAIN, scored on held-out rows",
    Scope.TEST_SELECTED: "chosen and scored on TEST rows: optimistic",
    Scope.ALL_FIT: "chosen and scored on all evaluated rows: descriptive",
}
_ALIASES = {
    Scope.TEST: {"test", "eval", "heldout", "legacy", "legacytest", "hqlegacytest", "hq(test)"},
    Scope.TEST_SELECTED: {"testselected", "hqt", "heldoutselected", "hq(selectedontest)"},
    Scope.ALL_FIT: {"allfit", "hqf", "all", "alldata", "fulldata", "finalallfit", "train+test", "hq(allfit)"},
}
DEFAULT_SCOPES = (Scope.TEST, Scope.ALL_FIT)


def parse_scopes(text: str) -> tuple[Scope, ...]:
    """Scopes from a comma list, in the order given, each once; `both` and `legacy_both` mean test and all_fit."""
    chosen: list[Scope] = []
    for piece in filter(None, (part.strip() for part in text.split(","))):
        both = re.sub(r"[-_\s]+", "", piece).lower() in ("both", "legacyboth")
        chosen += DEFAULT_SCOPES if both else (Scope.parse(piece),)
    if not chosen:
        raise UserError(f"no score scope is named; choose from {', '.join(scope.value for scope in Scope)}")
    return tuple(dict.fromkeys(chosen))
