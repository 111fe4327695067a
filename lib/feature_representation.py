"""A feature: a number that describes a prompt, with its label, its source and the column it fills."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from lib.scores_table import sanitize_label

if TYPE_CHECKING:
    import numpy as np

NativeFunction = Callable[[Mapping[str, "np.ndarray"]], "np.ndarray"]

MISSING_VALUE = 0.0
"""A feature that does not apply to a prompt (None, NaN or infinite) counts as 0 there: for the filters, in
`scores.csv`, in rules. One policy everywhere, so that no filter judges values that the rules never see."""

VALUE_LIMIT = 1e12
"""Values are clipped to plus or minus this, which float32 holds."""


class Origin(Enum):
    """Where a feature comes from."""

    SEED = "predefined"
    """Built into the task: trusted code."""

    LLM = "llm"
    """Proposed by a language model: its source only ever runs in the sandbox."""


@dataclass(frozen=True)
class Feature:
    """One feature of prompts.

    python_src: a function `(prompt: str, info: dict)` that returns a number, a bool or None (not applicable).
    native: for seed features, the same computed on whole columns (see `FeatureTaskSpec.native_columns`): [row] numbers,
    NaN where not applicable.
    """

    label: str
    description: str
    python_src: str = ""
    fn_name: str = ""
    origin: Origin = Origin.LLM
    native: NativeFunction | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The entry of `features.json`, without what scoring adds."""
        return {"label": self.label, "description": self.description, "python_src": self.python_src,
                "fn_name": self.fn_name, "origin": self.origin.value}


def per_row(function: Callable[..., float | bool | None], *columns: str) -> NativeFunction:
    """A native function from one that takes a single row's values of the named columns; None is not applicable."""
    def native(table: Mapping[str, np.ndarray]) -> np.ndarray:
        import numpy as np

        results = [function(*values) for values in zip(*(table[name] for name in columns), strict=True)]
        return np.array([np.nan if value is None else float(value) for value in results])

    return native


def assign_columns(labels: Sequence[str], reserved: Iterable[str]) -> list[str]:
    """A column name per label, all different and none of `reserved` (the dataset's own columns).

    The name is the sanitized label where possible. A name that is reserved or empty gets the prefix `feature`; of
    several labels with one name the first keeps it, the others take the next free `_2`, `_3`, ...
    """
    reserved = {name.lower() for name in reserved}
    bases = [_unreserved(sanitize_label(label), reserved) for label in labels]
    taken = reserved | set(bases)
    columns: list[str] = []
    seen: set[str] = set()
    for base in bases:
        name, suffix = base, 1
        while name in seen or (suffix > 1 and name in taken):
            suffix += 1
            name = f"{base}_{suffix}"
        seen.add(name)
        columns.append(name)
    return columns


def _unreserved(base: str, reserved: set[str]) -> str:
    name = base or "feature"
    while name in reserved:
        name = f"feature_{name}"
    return name
