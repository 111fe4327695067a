"""Attribution scores of every coordinate of every component's write, and the settings they depend on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from lib.eap.metrics import Metric, TokenAggregation


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
class NeuronScores:
    """Sums over pairs of each coordinate's score, float64.

    mlp: [layer, d_model]. heads: [layer, head, d_model] or None. embedding: [d_model]. n_pairs: pairs summed.
    """

    mlp: torch.Tensor
    heads: torch.Tensor | None
    embedding: torch.Tensor
    n_pairs: int = 0

    @classmethod
    def zeros(cls, n_layers: int, n_heads: int | None, d_model: int, device: torch.device) -> NeuronScores:
        """No pairs yet; `n_heads` None leaves heads out."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        heads = empty(n_layers, n_heads, d_model) if n_heads else None
        return cls(empty(n_layers, d_model), heads, empty(d_model))

    def add_(self, other: NeuronScores) -> None:
        """Add the scores of further pairs."""
        self.mlp += other.mlp
        self.embedding += other.embedding
        if self.heads is not None:
            self.heads += other.heads
        self.n_pairs += other.n_pairs

    def arrays(self) -> dict[str, np.ndarray]:
        """The sums as numpy arrays, as stored on disk."""
        arrays = {"mlp": self.mlp, "embedding": self.embedding}
        if self.heads is not None:
            arrays["heads"] = self.heads
        return {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
