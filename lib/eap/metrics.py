"""How far a run is from the clean one: one number per row, growing with the distance.

A positive attribution score therefore means: moving the coordinate towards its replacement takes the model away from
the answer it gave.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lib.eap.pairs import PairBatch


class Metric(Enum):
    """Distance from the clean run at one answer token."""

    LOG_PROB = "log-prob"
    """Minus the log-probability of the recorded answer token."""

    LOGIT_DIFF = "logit-diff"
    """Logit of the corrupted side's answer token minus that of the recorded one, where the two differ."""

    KL = "kl"
    """Kullback-Leibler divergence of the current next-token distribution from the clean one. Its gradient is zero at
    the clean input."""

    @property
    def has_gradient_at_clean_input(self) -> bool:
        """False for a distance that is at its minimum there."""
        return self is not Metric.KL


class TokenAggregation(Enum):
    """How the distances at an answer's tokens become one number."""

    MEAN = "mean"
    """Their mean."""

    NONE = "none"
    """Their sum: every token counts for itself."""

    MAX = "max"
    """That of the token that moved farthest."""

    MIN = "min"
    """That of the token that moved least."""

    def apply(self, values: torch.Tensor, is_scored: torch.Tensor) -> torch.Tensor:
        """[row, token] -> [row]; a row without scored tokens gives 0."""
        if self is TokenAggregation.MAX or self is TokenAggregation.MIN:
            sign = 1.0 if self is TokenAggregation.MAX else -1.0
            extreme = sign * torch.where(is_scored, sign * values, -torch.inf).amax(dim=1)
            return torch.where(is_scored.any(dim=1), extreme, 0.0)
        total = torch.where(is_scored, values, 0.0).sum(dim=1)
        return total / is_scored.sum(dim=1).clamp(min=1) if self is TokenAggregation.MEAN else total


@dataclass(frozen=True)
class Yardstick:
    """What runs of one batch are compared with. Token columns are those that predict an answer token.

    is_scored: [pair, token]. answer, other: recorded and corrupted-side answer ids, [pair, token]; `other` is -1 where
    that side has no token. clean_log_probs: [scored token in row-major order, vocabulary], for the divergence only.
    """

    metric: Metric
    aggregation: TokenAggregation
    is_scored: torch.Tensor
    answer: torch.Tensor
    other: torch.Tensor
    clean_log_probs: torch.Tensor | None = None

    @classmethod
    def of_batch(cls, batch: PairBatch, metric: Metric, aggregation: TokenAggregation) -> Yardstick:
        """The yardstick of a batch; `with_clean_logits` completes it where the metric needs that."""
        answer = batch.ids[0][:, batch.border :]
        other = torch.where(batch.is_real[1], batch.ids[1], -1)[:, batch.border :]
        is_scored = batch.is_real[0][:, batch.border :]
        if metric is Metric.LOGIT_DIFF:
            is_scored = is_scored & (other >= 0) & (other != answer)
        return cls(metric, aggregation, is_scored, answer, other)

    def with_clean_logits(self, clean_logits: torch.Tensor) -> Yardstick:
        """The same with the clean run's logits [scored token, vocabulary] kept where the metric compares with them."""
        if self.metric is not Metric.KL:
            return self
        log_probs = clean_logits.float().log_softmax(dim=-1)
        return Yardstick(self.metric, self.aggregation, self.is_scored, self.answer, self.other, log_probs)

    def repeated(self, times: int) -> Yardstick:
        """For runs that have `times` rows per pair, row by row."""
        if times == 1:
            return self
        log_probs = None
        if self.clean_log_probs is not None:
            owner = self.is_scored.nonzero()[:, 0]
            log_probs = torch.cat(
                [self.clean_log_probs[owner == pair].repeat(times, 1) for pair in range(len(self.is_scored))]
            )
        is_scored, answer, other = (
            tensor.repeat_interleave(times, 0) for tensor in (self.is_scored, self.answer, self.other)
        )
        return replace(self, is_scored=is_scored, answer=answer, other=other, clean_log_probs=log_probs)

    def measure(self, logits: torch.Tensor) -> torch.Tensor:
        """Distance of each row, [row], from logits [scored token in row-major order, vocabulary]."""
        logits = logits.float()
        answer = self.answer[self.is_scored][:, None]
        if self.metric is Metric.LOG_PROB:
            values = -logits.log_softmax(dim=-1).gather(1, answer)[:, 0]
        elif self.metric is Metric.LOGIT_DIFF:
            values = (logits.gather(1, self.other[self.is_scored][:, None]) - logits.gather(1, answer))[:, 0]
        else:
            current = logits.log_softmax(dim=-1)
            values = (self.clean_log_probs.exp() * (self.clean_log_probs - current)).sum(dim=-1)
        table = torch.zeros(self.is_scored.shape, device=logits.device, dtype=values.dtype)
        return self.aggregation.apply(table.masked_scatter(self.is_scored, values), self.is_scored)
