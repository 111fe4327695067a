"""Pairs that make life hard: mixed lengths on both sides, equal and unequal answers, a shared start."""

from __future__ import annotations

from functools import cache

from lib.eap.pairs import Pair, sequences
from lib.modeling_and_ablation import LanguageModel

CLEAN = [("1+1=2; 3+4=", "7"), ("1+1=2; 33+4=", "37"), ("1+1=2; 12*3=", "36;"), ("1+1=2; 7-5=", "2 1")]
CORRUPTED = [("1+1=2; 3-4=", "1 7"), ("1+1=2; 39+4=", "43"), ("1+1=2; 2+8=", "0"), ("1+1=2; 99/5=", "98")]


@cache
def mixed_pairs(lm: LanguageModel) -> list[Pair]:
    """Four pairs of unequal lengths."""
    sides = [sequences(lm, *map(list, zip(*side, strict=True))) for side in (CLEAN, CORRUPTED)]
    return [Pair(clean, corrupted) for clean, corrupted in zip(*sides, strict=True)]


@cache
def equal_length_pairs(lm: LanguageModel) -> list[Pair]:
    """Three pairs of equal prompt and answer lengths."""
    clean = sequences(lm, ["4+5=", "12*3=", "7-5="], ["9;", "36", "2"])
    corrupted = sequences(lm, ["4-5=", "12+9=", "8/5="], ["-1", "21", "1"])
    return [Pair(*two) for two in zip(clean, corrupted, strict=True)]
