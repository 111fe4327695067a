"""The most likely next token of a row from half-precision logits, exactly.

A product in bfloat16 is several times faster on processors that have it, and its error is bounded: rounding both
factors changes s . w by at most (2u + u^2) |s| |w| with u = 2^-8. So the rows' states and the vocabulary are rounded,
each token's bound rides along as one more coordinate, and what comes out is an upper bound of every logit. Only tokens
whose bound reaches the exact logit of the most promising one can win; these few are computed in full precision.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

_ROUNDING = 2.0**-8
_ERROR = 1.02 * (2 * _ROUNDING + _ROUNDING**2)
"""Relative error of a rounded product, with room for the float32 sums and for the rounding of the bound itself."""
_BLOCK = 64
_ROWS = 256
_MOST_CANDIDATES = 1 / 64
"""Share of a chunk's logits that may be computed exactly; beyond it plain products cost less."""


def pays(head: torch.nn.Linear, state: torch.Tensor) -> bool:
    """Whether rounded products are the faster way here: float32 on a processor that multiplies bfloat16.

    A projection with a bias is left to plain products.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    is_plain = getattr(head, "bias", None) is None and state.device.type == "cpu" and state.dtype == torch.float32
    return is_plain and bool(supported())


@dataclass(frozen=True)
class VocabularyScreen:
    """A vocabulary projection, rounded.

    head: the projection itself, weight [token, d_model]. rounded [token, d_model + 1]: its rows in bfloat16 with each
    row's error bound behind it; filled up to whole blocks with copies of the last token.
    """

    head: torch.nn.Linear
    rounded: torch.Tensor

    @classmethod
    def of(cls, head: torch.nn.Linear) -> VocabularyScreen:
        """The screen of a projection, made once."""
        if head not in _screens:
            weight = head.weight.detach()
            bounds = _ERROR * weight.norm(dim=1, keepdim=True)
            rounded = torch.cat([weight, bounds], dim=1).to(torch.bfloat16)
            filling = rounded[-1:].expand(-len(weight) % _BLOCK, -1)
            _screens[head] = cls(head, torch.cat([rounded, filling]))
        return _screens[head]

    def next_tokens(self, state: torch.Tensor) -> torch.Tensor:
        """The most likely token of each row, [row]; state [row, d_model] after the final norm."""
        parts = [self._next_tokens(state[start : start + _ROWS]) for start in range(0, len(state), _ROWS)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=state.device)

    def _next_tokens(self, state: torch.Tensor) -> torch.Tensor:
        n_rows = len(state)
        size = state.norm(dim=1, keepdim=True)
        upper = torch.nn.functional.linear(torch.cat([state, size], dim=1).to(torch.bfloat16), self.rounded)
        upper = upper.view(n_rows, -1, _BLOCK)
        best_of_block = upper.amax(-1)
        block = best_of_block.argmax(-1)
        rows = torch.arange(n_rows, device=state.device)
        promising = self._token(block, upper[rows, block].argmax(-1))
        # Rounding keeps order: a bound that is at least this logit is so after both are rounded.
        least = self._logits(state, rows, promising).to(torch.bfloat16)
        rows, blocks = torch.nonzero(best_of_block >= least[:, None], as_tuple=True)
        pairs, places = torch.nonzero(upper[rows, blocks] >= least[rows, None], as_tuple=True)
        if len(pairs) > _MOST_CANDIDATES * upper.numel():
            return self.head(state).argmax(-1)
        rows, tokens = rows[pairs], self._token(blocks[pairs], places)
        return _winners(n_rows, rows, tokens, self._logits(state, rows, tokens))

    def _token(self, blocks: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The token at a place of a block."""
        return (blocks * _BLOCK + places).clamp(max=len(self.head.weight) - 1)

    def _logits(self, state: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Exact logits of (row, token) pairs."""
        return (state[rows] * self.head.weight[tokens]).sum(-1)


_screens: weakref.WeakKeyDictionary[torch.nn.Linear, VocabularyScreen] = weakref.WeakKeyDictionary()


def _winners(n_rows: int, rows: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The token with the highest logit of each row; ties go to the lowest, as in an argmax over the vocabulary."""
    best = logits.new_full((n_rows,), -torch.inf).scatter_reduce(0, rows, logits, "amax")
    tied = logits == best[rows]
    unknown = tokens.new_full((n_rows,), torch.iinfo(tokens.dtype).max)
    return unknown.scatter_reduce(0, rows[tied], tokens[tied], "amin")
