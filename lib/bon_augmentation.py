"""Best-of-N text augmentation (Hughes et al. 2024): shuffled words, random capitals, neighbouring characters.

Three independent noises of one strength sigma in [0, 1]: a word of at least four letters has its inner letters shuffled
with probability sqrt(sigma), a letter changes case with probability sqrt(sigma), a printable ASCII character moves to a
neighbouring code with probability sigma cubed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from lib.cli import UserError, rng

REQUEST_COLUMNS = ("original_prompt", "request", "prompt", "Goal", "goal", "Behavior", "behavior", "instruction",
                   "text")
"""Names of the column with the requests, first found wins. JailbreakBench calls it Goal, and its Behavior is a short
title; HarmBench has the request in Behavior and no Goal."""
_WORD = re.compile(r"[^\W\d_]{4,}")


class Noise(Enum):
    """One of the three noises."""

    SCRAMBLING = "scrambling"
    """The inner letters of words are shuffled."""

    CAPITALIZATION = "capitalization"
    """Letters change case."""

    PERTURBATION = "perturbation"
    """Characters move to a neighbouring ASCII code."""


@dataclass(frozen=True)
class Augmented:
    """A noisy text and how much was changed: words, letters, characters."""

    text: str
    words_scrambled: int
    chars_capitalized: int
    chars_perturbed: int

    @property
    def stats(self) -> dict[str, int]:
        """The counts, as the features use them."""
        return {"words_scrambled": self.words_scrambled, "chars_capitalized": self.chars_capitalized,
                "chars_perturbed": self.chars_perturbed}


def augment(text: str, sigma: float, noises: frozenset[Noise], stream: np.random.Generator) -> Augmented:
    """Apply the noises in the order scrambling, capitals, perturbation."""
    n_words = n_capitals = n_characters = 0
    if Noise.SCRAMBLING in noises:
        text, n_words = scramble(text, sigma**0.5, stream)
    if Noise.CAPITALIZATION in noises:
        text, n_capitals = flip_case(text, sigma**0.5, stream)
    if Noise.PERTURBATION in noises:
        text, n_characters = shift_characters(text, sigma**3, stream)
    return Augmented(text, n_words, n_capitals, n_characters)


def scramble(text: str, probability: float, stream: np.random.Generator) -> tuple[str, int]:
    """Shuffle the inner letters of chosen words; the count is of words that really changed."""
    count = 0

    def changed(match: re.Match[str]) -> str:
        nonlocal count
        word = match[0]
        if stream.random() >= probability:
            return word
        inner = list(word[1:-1])
        stream.shuffle(inner)
        shuffled = word[0] + "".join(inner) + word[-1]
        count += shuffled != word
        return shuffled

    return _WORD.sub(changed, text), count


def flip_case(text: str, probability: float, stream: np.random.Generator) -> tuple[str, int]:
    """Change the case of chosen letters."""
    chosen = stream.random(len(text)) < probability
    # A few letters become two when their case changes (ß): these stay, so that lengths do too.
    flipped = "".join(character.swapcase() if change and len(character.swapcase()) == 1 else character
                      for character, change in zip(text, chosen, strict=True))
    return flipped, sum(old != new for old, new in zip(text, flipped, strict=True))


def shift_characters(text: str, probability: float, stream: np.random.Generator) -> tuple[str, int]:
    """Move chosen printable ASCII characters one code up or down, staying printable."""
    chosen = stream.random(len(text)) < probability
    steps = np.where(stream.random(len(text)) < 0.5, -1, 1)
    shifted = "".join(_neighbour(character, int(step)) if change else character
                      for character, change, step in zip(text, chosen, steps, strict=True))
    return shifted, sum(old != new for old, new in zip(text, shifted, strict=True))


def _neighbour(character: str, step: int) -> str:
    code = ord(character)
    if not 32 <= code <= 126:
        return character
    return chr(code + step) if 32 <= code + step <= 126 else chr(code - step)


def build_dataset(requests: list[str], sigmas: list[float], n_samples: int, noises: frozenset[Noise],
                  seed: int) -> list[dict[str, Any]]:
    """`n_samples` noisy variants of each request, strengths in turn; equal or empty variants are left out."""
    if not noises:
        raise UserError("every kind of noise is switched off: nothing would be augmented")
    wrong = [sigma for sigma in sigmas if not 0 < sigma <= 1]
    if wrong:
        raise UserError(f"--sigma {wrong[0]}: must be above 0 and at most 1")
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for request in dict.fromkeys(requests):
        for sample in range(n_samples):
            sigma = sigmas[sample % len(sigmas)]
            # The stream depends on the request's text, so adding a request changes no other's variants.
            found = augment(request, sigma, noises, rng(seed, "bon", request, sample))
            text = found.text.strip()
            if text and text not in seen:
                seen.add(text)
                info = {"sigma": sigma, "stats": found.stats}
                rows.append({"prompt": text, "original_prompt": request, "augmentation_info": info})
    return rows


def read_requests(path: Path, column: str) -> list[str]:
    """The requests of a table, in order; with an empty `column` the first known name is taken."""
    from lib.tasks.table_task import read_table

    frame = read_table(path)
    known = [column] if column else [name for name in REQUEST_COLUMNS if name in frame.columns]
    if not known or known[0] not in frame.columns:
        raise UserError(f"{path} has no column {column or 'of requests'}; its columns are {', '.join(frame.columns)}; "
                        "name one with --request_col")
    requests = [text for text in frame[known[0]] if text]
    if not requests:
        raise UserError(f"{path}: the column {known[0]} holds no requests")
    return requests
