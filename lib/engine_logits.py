"""Which rows still predict the baseline's next token, without computing the vocabulary for most of them.

The baseline's winner y has logit z_y and every other token j trails by m_j = z_y - z_j. A row whose final state moved
by d changes that gap by d . (w_j - w_y), at most |d| |w_j - w_y|. So only tokens with m_j / |w_j - w_y| <= |d| can win:
usually none, sometimes a handful. Exact up to rounding, for which a slack is added to |d|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lib import engine_screen
from lib.modeling_and_ablation import LanguageModel

N_RIVALS = 512
_SLACK = 1e-3
_ROWS = 2048


@dataclass(frozen=True)
class Rivals:
    """For a set of places (datapoint, position): the final state, the winner and its nearest rivals.

    state [place, d_model] after the final norm; winner [place]; reach [place, rival] the |d| from which a rival can
    win, ascending; tokens [place, rival].
    """

    state: torch.Tensor
    winner: torch.Tensor
    reach: torch.Tensor
    tokens: torch.Tensor

    def select(self, places: torch.Tensor) -> Rivals:
        """Some of the places."""
        return Rivals(self.state[places], self.winner[places], self.reach[places], self.tokens[places])


def find_rivals(lm: LanguageModel, final: torch.Tensor) -> Rivals:
    """Rivals at the baseline's places; final [place, d_model] is the residual stream after the last block."""
    n_rivals = min(N_RIVALS, lm.vocab_size - 1)
    parts = []
    for start in range(0, max(len(final), 1), 64):
        state = lm.final_norm(final[start : start + 64])
        logits = lm.lm_head(state).float()
        top, winner = logits.max(-1, keepdim=True)
        winners, place = winner[:, 0].unique(return_inverse=True)
        reach = (top - logits).div_(_distances(lm, winners)[place]).scatter_(1, winner, torch.inf)
        nearest = reach.topk(n_rivals, largest=False, sorted=True)
        parts.append(Rivals(state, winner[:, 0], nearest.values, nearest.indices))
    return Rivals(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("state", "winner", "reach", "tokens"))
    )


def _distances(lm: LanguageModel, winners: torch.Tensor) -> torch.Tensor:
    """Distance of each winner's output vector from every token's, [winner, token]."""
    weight = lm.lm_head.weight
    squares = weight.float().square().sum(1)
    products = (weight[winners] @ weight.T).float()
    return (squares + squares[winners, None]).sub_(products, alpha=2).clamp_(min=1e-12).sqrt_()


def next_tokens(lm: LanguageModel, hidden: torch.Tensor) -> torch.Tensor:
    """The most likely next token of each row, [row]; hidden [row, d_model]: residual stream after the last block."""
    if engine_screen.pays(lm.lm_head, hidden):
        return engine_screen.VocabularyScreen.of(lm.lm_head).next_tokens(lm.final_norm(hidden))
    tokens = [
        lm.lm_head(lm.final_norm(hidden[start : start + _ROWS])).argmax(-1) for start in range(0, len(hidden), _ROWS)
    ]
    return torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.long, device=hidden.device)


def next_tokens_near(lm: LanguageModel, rivals: Rivals, hidden: torch.Tensor) -> torch.Tensor:
    """The most likely next tokens of ablated rows, [group, place]; hidden [group, place, d_model], float32.

    Same result as `next_tokens` on each row; most rows need no logits, the rest those of a few rivals. The bound leaves
    no room for the rounding of half precision.
    """
    state = lm.final_norm(hidden)
    moved = (state - rivals.state[None]).norm(dim=-1) * (1 + _SLACK) + _SLACK
    counts = torch.searchsorted(rivals.reach, moved.T.contiguous()).T
    predicted = rivals.winner[None].expand(hidden.shape[:2]).clone()
    n_rivals = rivals.reach.shape[1]
    # A row beyond the kept rivals needs the whole vocabulary, unless the kept rivals are the whole vocabulary.
    is_far = (counts >= n_rivals) & (n_rivals < lm.vocab_size - 1)
    if bool(is_far.any()):
        predicted[is_far] = next_tokens(lm, hidden[is_far])
    contested = (counts > 0) & ~is_far
    bias = getattr(lm.lm_head, "bias", None)
    for place in torch.nonzero(contested.any(0)).flatten().tolist():
        groups = torch.nonzero(contested[:, place]).flatten()
        width = int(counts[groups, place].max())
        # Ascending order, so that a tie goes to the lowest token as it does in an argmax over the vocabulary.
        tokens = torch.cat([rivals.winner[place : place + 1], rivals.tokens[place, :width]]).sort().values
        logits = state[groups, place] @ lm.lm_head.weight[tokens].T
        if bias is not None:
            logits = logits + bias[tokens]
        predicted[groups, place] = tokens[logits.argmax(-1)]
    return predicted
