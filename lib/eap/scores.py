"""Attribution scores of every coordinate of every component's write, and the settings they depend on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import torch

from lib.eap.metrics import Metric, TokenAggregation

if TYPE_CHECKING:
    from lib.modeling_and_ablation import LanguageModel


class Method(Enum):
    """How the effect of replacing a coordinate is estimated."""

    EAP = "EAP"
    """First order: change of the coordinate times the gradient at the clean input."""

    EAP_IG_INPUTS = "EAP-IG-inputs"
    """The gradient averaged over midpoints of the straight path from clean to corrupted token embeddings."""

    EAP_IG_ACTIVATIONS = "EAP-IG-activations"
    """For each component its own gradient, averaged along the path of its own write to the replacement."""

    CLEAN_CORRUPTED = "clean-corrupted"
    """The mean of the gradients at the clean and the corrupted token embeddings."""

    INFORMATION_FLOW_ROUTES = "information-flow-routes"
    """Share of a write in what a reader sees, from the clean run alone (edges only)."""

    EXACT = "exact"
    """The metric's change when the unit really is replaced, one unit at a time: for small models, and as the judge."""


class AttributionIntervention(Enum):
    """What the coordinate would be replaced by."""

    PATCHING = "patching"
    """Its value in the corrupted run."""

    ZERO = "zero"
    """0."""

    MEAN = "mean"
    """Its mean over reference tokens."""

    MEAN_POSITIONAL = "mean-positional"
    """Its mean over reference tokens at the same position."""


class GradientSite(Enum):
    """Where the gradient of an MLP write is taken."""

    MLP_OUT = "mlp_out"
    """At the write itself, the place that is replaced."""

    MLP_IN = "mlp_in"
    """At the same coordinate of the stream that this MLP reads, through this MLP only (as in the published scores)."""


@dataclass(frozen=True)
class AttributionSettings:
    """Everything that decides the scores, apart from model and pairs."""

    method: Method = Method.EAP_IG_INPUTS
    metric: Metric = Metric.LOG_PROB
    aggregation: TokenAggregation = TokenAggregation.MEAN
    intervention: AttributionIntervention = AttributionIntervention.PATCHING
    decode_only: bool = False
    n_steps: int = 3
    with_heads: bool = False
    gradient_site: GradientSite = GradientSite.MLP_OUT

    @property
    def alphas(self) -> list[float]:
        """Points of the path from clean (0) to corrupted (1) at which gradients are averaged."""
        if self.method is Method.EAP:
            return [0.0]
        if self.method is Method.CLEAN_CORRUPTED:
            return [0.0, 1.0]
        return [(step + 0.5) / self.n_steps for step in range(self.n_steps)]


@dataclass
class WriteTable:
    """A number per coordinate of every write, float64; or one per whole write (width 1 in place of d_model).

    mlp: [layer, d_model]. heads: [layer, head, d_model] or None. embedding: [d_model].
    """

    mlp: torch.Tensor
    heads: torch.Tensor | None
    embedding: torch.Tensor

    @classmethod
    def filled(cls, value: float, n_layers: int, n_heads: int | None, width: int, device: torch.device) -> WriteTable:
        """The same number everywhere; `n_heads` None leaves heads out."""

        def full(*shape: int) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.float64, device=device)

        heads = full(n_layers, n_heads, width) if n_heads else None
        return cls(full(n_layers, width), heads, full(width))

    def arrays(self, suffix: str = "") -> dict[str, np.ndarray]:
        """As numpy arrays, by name."""
        tensors = {"mlp": self.mlp, "embedding": self.embedding}
        if self.heads is not None:
            tensors["heads"] = self.heads
        return {name + suffix: tensor.cpu().numpy() for name, tensor in tensors.items()}


@dataclass
class WriteScores:
    """Scores of every coordinate, summed over pairs: `signed` as they are, `magnitude` without their signs.

    A coordinate that pushes half of the pairs up and half down has signed sum 0 and a large magnitude. With
    `whole_writes` the unit is a component: coordinates are summed pair by pair, before signs are dropped.
    """

    signed: WriteTable
    magnitude: WriteTable
    whole_writes: bool = False
    n_pairs: int = 0

    @classmethod
    def empty(cls, language_model: LanguageModel, with_heads: bool, whole_writes: bool = False) -> WriteScores:
        """No pairs yet."""
        n_heads = language_model.n_heads if with_heads else None
        width = 1 if whole_writes else language_model.d_model
        shape = (language_model.n_layers, n_heads, width, language_model.device)
        return cls(WriteTable.filled(0.0, *shape), WriteTable.filled(0.0, *shape), whole_writes)

    def merge(self, other: WriteScores) -> None:
        """Add the scores of further pairs."""
        for own, new in ((self.signed, other.signed), (self.magnitude, other.magnitude)):
            own.mlp += new.mlp
            own.embedding += new.embedding
            if own.heads is not None:
                own.heads += new.heads
        self.n_pairs += other.n_pairs

    def add_mlp(self, layer: int, values: torch.Tensor) -> None:
        """Add an MLP's scores of some pairs, [pair, d_model]."""
        values = self._units(values)
        self.signed.mlp[layer] += values.sum(dim=0)
        self.magnitude.mlp[layer] += values.abs().sum(dim=0)

    def add_heads(self, layer: int, values: torch.Tensor, heads: slice | int = slice(None)) -> None:
        """Add scores of some pairs for all heads of a layer [pair, head, d_model], or for one [pair, d_model]."""
        values = self._units(values)
        self.signed.heads[layer, heads] += values.sum(dim=0)
        self.magnitude.heads[layer, heads] += values.abs().sum(dim=0)

    def add_embedding(self, values: torch.Tensor) -> None:
        """Add the token embeddings' scores of some pairs, [pair, d_model]."""
        values = self._units(values)
        self.signed.embedding += values.sum(dim=0)
        self.magnitude.embedding += values.abs().sum(dim=0)

    def _units(self, values: torch.Tensor) -> torch.Tensor:
        """Scores of coordinates [..., d_model] (or of whole writes [..., 1]) as scores of units."""
        values = values.double()
        return values.sum(dim=-1, keepdim=True) if self.whole_writes else values

    def arrays(self) -> dict[str, np.ndarray]:
        """The sums as stored on disk: `mlp`, `embedding`, `heads`, and the same with `_magnitude`."""
        return {**self.signed.arrays(), **self.magnitude.arrays("_magnitude")}
