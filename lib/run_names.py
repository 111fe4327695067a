"""Names of runs and folders: which choices of a run appear in its paths, and where its files live.

The grammar is the one of archived results, so that runs of both find each other's files; a size is a number of
units or a share like 0.1:

    circuit label = (spectral_split | rule_split-{spectral|random}_sample)[-M<size>][-decode_only][-eval_<kind>]
    bag label     = agonist_neurons[-fast]-{spectral|random}_anchor[-tau<rate>]
    run name      = <circuit label>-<bag label>[-fake_targets]
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from lib.artifacts import model_slug

DEFAULT_CIRCUIT_SIZE = 100_000
DEFAULT_MIN_FLIP_RATE = "0.2"
UNNAMED_INTERVENTIONS = ("mean", "mean-positional")
REGIMES = ("positive", "negative")


def size_text(size: int | float) -> str:
    """A circuit size in names and commands: units, or a share with all its decimals (0.00001, never 1e-05)."""
    return format(Decimal(repr(size)), "f")


@dataclass(frozen=True)
class RunChoices:
    """The choices that appear in names. `min_flip_rate` is text: the name repeats it as it was given."""

    spectral_splits: bool
    spectral_discovery: bool
    spectral_anchoring: bool
    fast_anchoring: bool
    decode_only: bool
    incorrect_rules: bool
    circuit_size: int | float
    """Units, or a share of all candidates (a float)."""
    min_flip_rate: str
    eval_intervention: str

    @property
    def circuit_label(self) -> str:
        """Name of what stage 5 does."""
        sample = "spectral" if self.spectral_discovery else "random"
        label = "spectral_split" if self.spectral_splits else f"rule_split-{sample}_sample"
        if self.circuit_size != DEFAULT_CIRCUIT_SIZE:
            label += f"-M{size_text(self.circuit_size)}"
        if self.decode_only:
            label += "-decode_only"
        if self.eval_intervention not in UNNAMED_INTERVENTIONS:
            label += f"-eval_{self.eval_intervention}"
        return label

    @property
    def bag_label(self) -> str:
        """Name of what stage 6 does."""
        label = "agonist_neurons"
        if self.fast_anchoring:
            label += "-fast"
        label += "-spectral_anchor" if self.spectral_anchoring else "-random_anchor"
        if float(self.min_flip_rate) != float(DEFAULT_MIN_FLIP_RATE):
            label += f"-tau{self.min_flip_rate}"
        return label

    @property
    def run_name(self) -> str:
        """Name of the run's folder under `stats/`."""
        return f"{self.circuit_label}-{self.bag_label}" + ("-fake_targets" if self.incorrect_rules else "")


@dataclass(frozen=True)
class RunPaths:
    """Where one run of one task and model keeps its files."""

    data_root: Path
    cache_root: Path
    task: str
    ai_model: str
    method: str
    choices: RunChoices

    @property
    def model_dir(self) -> Path:
        """data/<task>/<model>"""
        return self.data_root / self.task / model_slug(self.ai_model)

    @property
    def task_cache_dir(self) -> Path:
        """cache/<task>"""
        return self.cache_root / self.task

    @property
    def model_cache_dir(self) -> Path:
        """cache/<task>/<model>"""
        return self.task_cache_dir / model_slug(self.ai_model)

    @property
    def answers(self) -> Path:
        """Prompts and answers (stage 1)."""
        return self.model_cache_dir / "llm_io_data.pkl"

    @property
    def features_dir(self) -> Path:
        """Feature table (stage 2)."""
        return self.model_dir / "feature_report"

    @property
    def rules_dir(self) -> Path:
        """Rules of the behaviour (stage 3)."""
        return self.model_dir / "rule_extraction_results"

    @property
    def discovery_dir(self) -> Path:
        """Plans, circuits and agonists of this run (stages 4 to 6)."""
        kind = "neural_circuit_discovery_results" + ("_fake_targets" if self.choices.incorrect_rules else "")
        return self.model_dir / kind / self.method.lower().replace("-", "_") / self.choices.circuit_label

    @property
    def discovery_plan(self) -> Path:
        """Datapoints that stand for each rule in stage 5."""
        return self.discovery_dir / "spectral_sampling_plan_hidden_for_circuit_discovery.json"

    def anchoring_plan(self, regime: str) -> Path:
        """Datapoints that stand for each rule in stage 6, for one baseline regime."""
        return self.discovery_dir / f"spectral_sampling_plan_hidden_for_neuron_ablation_baseline_{regime}.json"

    @property
    def circuits_dir(self) -> Path:
        """Candidate neurons (stage 5)."""
        return self.discovery_dir / "neural_circuits"

    @property
    def agonists_dir(self) -> Path:
        """Tested groups and agonists (stage 6), one subfolder per regime."""
        return self.discovery_dir / self.choices.bag_label

    def regime_dir(self, regime: str) -> Path:
        """Stage 6's folder of one baseline regime."""
        return self.agonists_dir / f"{regime}_baseline"

    @property
    def flip_rules_dir(self) -> Path:
        """Flips and anchored rules (stage 7)."""
        return self.rules_dir / "neuron_flip_rules"

    @property
    def stats_dir(self) -> Path:
        """Tables and figures of this run (stage 7)."""
        return self.flip_rules_dir / "stats" / self.choices.run_name
