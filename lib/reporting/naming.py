"""Names of finished runs: reading them back into choices, what they are called in tables, where their folders are.

The grammar itself is the one of `lib/run_names.py`. Archived names may differ from what it writes (`-tau0.20`, a donor
suffix, a sensitivity part at either end); the text of a folder's name is therefore kept beside its meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from lib.run_names import DEFAULT_CIRCUIT_SIZE, DEFAULT_MIN_FLIP_RATE, RunChoices

_NAME = re.compile(
    r"(?P<circuit>(?P<split>spectral_split|rule_split-(?P<discovery>random|spectral)_sample)"
    r"(?:-M(?P<size>\d+(?:\.\d+)?))?(?P<decode>-decode_only)?(?:-eval_(?P<eval>[a-z][a-z_-]*?))?)"
    r"-(?P<bag>agonist_neurons(?P<fast>-fast)?-(?P<anchor>random|spectral)_anchor(?:-tau(?P<tau>\d+(?:\.\d+)?))?"
    r"(?:-(?P<donor>zero|resample|mean(?:-donor)?(?:-positional)?))?)(?P<fake>-fake_targets)?",
    re.ASCII,
)
_SIZE_PART = re.compile(r"(?:^|-)M(\d+(?:\.\d+)?)(?=-|$)", re.IGNORECASE | re.ASCII)
_RATE_PART = re.compile(r"(?:^|-)tau(\d+(?:\.\d+)?)(?=-|$)", re.ASCII)
_EVAL_PART = re.compile(r"-eval_[a-z][a-z_-]*?(?=-agonist_neurons)", re.ASCII)


class RunMode(Enum):
    """The run modes that are compared, in canonical order; the value is the name in tables and stage 10."""

    SPECTRAL_PLAN = "Rule split + spectral coverage"
    """The main method: circuits of rules, datapoints that cover each rule's region."""

    RANDOM_PLAN = "Rule split + random coverage"
    """As the main method, with random datapoints in the search."""

    FAKE_TARGETS = "Fake rule split + spectral coverage"
    """Control: rules of a shuffled behaviour."""

    SPECTRAL_SPLIT = "Spectral split (no rule)"
    """Control: clusters of datapoints instead of rules."""

    BRUTE_FORCE = "Rule split + bruteforce search"
    """Reference: every candidate tested alone."""

    @property
    def stage_8_label(self) -> str:
        """Name in stage 8's tables and figures."""
        return _STAGE_LABELS[self][0]

    @property
    def stage_9_label(self) -> str:
        """Name in stage 9's tables and figures."""
        return _STAGE_LABELS[self][1]

    @property
    def order(self) -> int:
        """Place in the canonical order."""
        return list(RunMode).index(self)

    @classmethod
    def from_label(cls, text: str) -> RunMode | None:
        """The mode that any of its names, old or new, stands for."""
        return _LABELS.get(_squeeze(text))

    @property
    def run_name(self) -> RunName:
        """The mode's run at default settings, decode-only: a folder's name under `stats/`."""
        return RunName.of(_choices_of(self))


_STAGE_LABELS = {
    RunMode.SPECTRAL_PLAN: ("Rule split w/ Spectral anchoring plan", "Rule split + Spectral plan"),
    RunMode.RANDOM_PLAN: ("Rule split w/ Random anchoring plan", "Rule split + Random plan"),
    RunMode.FAKE_TARGETS: ("Fake rule split w/ Spectral anchoring plan", "Fake rule split + Spectral plan"),
    RunMode.SPECTRAL_SPLIT: ("Spectral split", "Spectral split"),
    RunMode.BRUTE_FORCE: ("Rule split w/ Bruteforce search", "Rule split + Bruteforce search"),
}


def _squeeze(text: str) -> str:
    """A label without what differs between its spellings."""
    text = text.lower().replace("w/", "+").replace("anchoring plan", "plan")
    text = re.sub(r"\b(coverage|cov\.?|anchor|plan)(?=\s|$)", "plan", text)
    return re.sub(r"[^a-z]+", " ", text.replace("(no rule)", "")).strip()


@dataclass(frozen=True)
class RunName:
    """A run's name and what it says. `text` is the folder's name; the labels are the pieces of it that name folders."""

    text: str
    circuit_label: str
    bag_label: str
    choices: RunChoices
    donor: str = ""

    @classmethod
    def parse(cls, text: str) -> RunName | None:
        """The run of a folder's name, or None if it is not one of ours."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        choices = RunChoices(
            spectral_splits=match["split"] == "spectral_split",
            spectral_discovery=match["discovery"] == "spectral",
            spectral_anchoring=match["anchor"] == "spectral",
            fast_anchoring=match["fast"] is not None,
            decode_only=match["decode"] is not None,
            incorrect_rules=match["fake"] is not None,
            circuit_size=_size(match["size"]) or DEFAULT_CIRCUIT_SIZE,
            min_flip_rate=match["tau"] or DEFAULT_MIN_FLIP_RATE,
            eval_intervention=match["eval"] or "mean-positional",
        )
        return cls(text, match["circuit"], match["bag"], choices, match["donor"] or "")

    @classmethod
    def of(cls, choices: RunChoices) -> RunName:
        """The name that a run with these choices gets."""
        return cls(choices.run_name, choices.circuit_label, choices.bag_label, choices)

    @property
    def is_fake(self) -> bool:
        """Whether the run is the control with rules of a shuffled behaviour."""
        return self.choices.incorrect_rules

    @property
    def variant(self) -> str:
        """The parts that are not of the mode (size, rate, intervention), or "" for a run at the main settings."""
        size, rate, kind = _SIZE_PART.search(self.text), _RATE_PART.search(self.text), _EVAL_PART.search(self.text)
        parts = [found.group(0).strip("-") for found in (size, kind, rate) if found]
        return "-".join([*parts, self.donor] if self.donor else parts)

    @property
    def mode(self) -> RunMode | None:
        """The run mode, whatever the variant, decode-only or not; None for a combination outside the grid."""
        key = _mode_key(self.choices)
        return next((mode for mode in RunMode if _mode_key(_choices_of(mode)) == key), None)

    @property
    def discovery_base(self) -> str:
        """Folder of a model root that holds the run's circuits: the control has its own."""
        return "neural_circuit_discovery_results" + ("_fake_targets" if self.is_fake else "")

    @property
    def without_decode_only(self) -> str:
        """The same run's name before `-decode_only` was a part of names (HANS)."""
        return self.text.replace("-decode_only", "", 1)


def _size(text: str | None) -> int | float | None:
    """A circuit size in a name: units, or with a point a share."""
    return None if text is None else float(text) if "." in text else int(text)


def _choices_of(mode: RunMode) -> RunChoices:
    splits = mode is RunMode.SPECTRAL_SPLIT
    return RunChoices(
        spectral_splits=splits,
        spectral_discovery=not splits,
        spectral_anchoring=mode not in (RunMode.SPECTRAL_SPLIT, RunMode.RANDOM_PLAN),
        fast_anchoring=mode is not RunMode.BRUTE_FORCE,
        decode_only=True,
        incorrect_rules=mode is RunMode.FAKE_TARGETS,
        circuit_size=DEFAULT_CIRCUIT_SIZE,
        min_flip_rate=DEFAULT_MIN_FLIP_RATE,
        eval_intervention="mean-positional",
    )


def _mode_key(choices: RunChoices) -> tuple[bool, ...]:
    return (
        choices.spectral_splits,
        choices.spectral_discovery,
        choices.spectral_anchoring,
        choices.fast_anchoring,
        choices.incorrect_rules,
    )


_LABELS = {_squeeze(label): mode for mode in RunMode for label in (mode.value, mode.stage_8_label, mode.stage_9_label)}
MAIN_RUN = RunMode.SPECTRAL_PLAN.run_name.text
BRUTE_FORCE_RUN = RunMode.BRUTE_FORCE.run_name.text


def label_of(run_name: str, style: str = "tables") -> str:
    """A run's display name (`tables`, `stage_8` or `stage_9`), with its variant; unknown runs keep their name."""
    parsed = RunName.parse(run_name)
    if parsed is None or parsed.mode is None:
        return run_name
    mode = parsed.mode
    label = {"tables": mode.value, "stage_8": mode.stage_8_label, "stage_9": mode.stage_9_label}[style]
    return f"{label} [{parsed.variant}]" if parsed.variant else label


def canonical_order(run_names: Iterable[str]) -> list[str]:
    """Run names by mode, then variant, then text; unknown ones last."""

    def key(text: str) -> tuple[int, str, str]:
        parsed = RunName.parse(text)
        mode = parsed.mode if parsed else None
        return (mode.order if mode else len(RunMode), parsed.variant if parsed else "", text)

    return sorted(set(run_names), key=key)


def resolve_run(wanted: str, present: Iterable[str]) -> str | None:
    """The folder that holds a run: its exact name, else the same name without `-decode_only`, else None."""
    names = set(present)
    return next((name for name in (wanted, wanted.replace("-decode_only", "", 1)) if name in names), None)


@dataclass(frozen=True)
class SensitivityParts:
    """A run name split into what sensitivity runs vary and the rest."""

    base: str
    circuit_size: int | float | None
    min_flip_rate: float | None


def sensitivity_parts(run_name: str) -> SensitivityParts:
    """Size and rate named in a run's name (at either end too), and the name without them."""
    size, rate = _SIZE_PART.search(run_name), _RATE_PART.search(run_name)
    base = _RATE_PART.sub("", _SIZE_PART.sub("", run_name)).strip("-")
    return SensitivityParts(base, _size(size[1] if size else None), float(rate[1]) if rate else None)


# ---------------------------------------------------------------- tasks and models

_TASK_LABELS = {
    "arithmetic": "Arithmetic",
    "bon_jailbreaking": "Jailbreaking",
    "jailbreaking": "Jailbreaking",
    "hans_nli": "HANS NLI",
}
_TASK_ORDER = ("Arithmetic", "Jailbreaking", "HANS NLI")
_MODEL_ORDER = ("Qwen2-7B", "GPT-J", "Qwen2-1.5B")


def task_label(task: str) -> str:
    """A task's name in tables."""
    return _TASK_LABELS.get(task, task.replace("_", " ").title())


def model_label(model: str) -> str:
    """A model's name in tables; `model` with or without its organisation."""
    name = model.rsplit("/", 1)[-1]
    if name.lower().startswith("gpt-j"):
        return "GPT-J"
    return name.removesuffix("-Instruct") if name.startswith("Qwen") else name


def row_order(task: str, model: str) -> tuple[int, str, int, str]:
    """Sort key of a (task, model) row in every table."""
    task_text, model_text = task_label(task), model_label(model)
    return (
        _TASK_ORDER.index(task_text) if task_text in _TASK_ORDER else len(_TASK_ORDER),
        task_text,
        _MODEL_ORDER.index(model_text) if model_text in _MODEL_ORDER else len(_MODEL_ORDER),
        model,
    )
