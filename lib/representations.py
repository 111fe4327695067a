"""A model's representation of each prompt, computed once and kept on disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lib.artifacts import exclusive, file_digest, read_json, read_npy, text_digest, write_json
from lib.cli import UserError
from lib.modeling_and_ablation import model_identity

if TYPE_CHECKING:
    import torch

    from lib.cli import Report
    from lib.modeling_and_ablation import LanguageModel

_CHECKPOINT_EVERY = 2048
"""Prompts between two points from which an interrupted run goes on."""


class Space(Enum):
    """What stands for a prompt."""

    HIDDEN = "hidden"
    """The activation at `--rep_hook_name`."""

    LOGITS = "logits"
    """Next-token logits, one number per vocabulary entry."""


class Pooling(Enum):
    """How token positions become one vector."""

    LAST = "last"
    """The last prompt token."""

    MEAN = "mean"
    """The mean over the prompt's tokens."""


@dataclass(frozen=True)
class RepresentationSpec:
    """Which representation is wanted."""

    space: str = "hidden"
    hook_name: str = "ln_final.hook_normalized"
    pooling: str = "mean"
    max_seq_len: int | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class RowView:
    """Chosen rows of a (memory-mapped) table, read where they are looked at: never all of them at once.

    Slicing gives an array; so does `numpy.asarray`, for small ones.
    """

    table: np.ndarray
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, width)"""
        return len(self.rows), self.table.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: slice) -> np.ndarray:
        return self.table[self.rows[key]]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.table[self.rows], dtype=dtype)


def prompt_representations(
    ai_model: str,
    load: Callable[[], LanguageModel],
    prompts: Sequence[str],
    spec: RepresentationSpec,
    cache_dir: str | Path,
    *,
    batch_size: int,
    report: Report,
) -> np.ndarray:
    """Representations of `prompts`, [prompt, width] float32, a read-only memory map.

    Kept as `<cache_dir>/spectral_reps_<key>.npy` with a JSON header of the same name; the key covers the model, the
    spec and the prompts. `load` is called only when they have to be computed. An interrupted run goes on from its
    last checkpoint.
    """
    unique = list(dict.fromkeys(prompts))
    key: dict[str, object] = {
        "model": model_identity(ai_model),
        "spec": asdict(spec),
        "prompts_sha256": text_digest(unique),
    }
    stem = Path(cache_dir) / f"spectral_reps_{text_digest(key)[:16]}"
    if not _is_whole(stem):
        with exclusive(cache_dir):
            _compute(load(), unique, spec, stem, key, batch_size, report)
    stored = read_npy(stem.with_suffix(".npy"), "representation cache", mmap=True)
    if len(unique) == len(prompts):
        return stored
    row_of = {prompt: row for row, prompt in enumerate(unique)}
    return stored[[row_of[prompt] for prompt in prompts]]


def _is_whole(stem: Path) -> bool:
    """True if the table is there as its header, written after it, says; a damaged one is computed again."""
    header, table = stem.with_suffix(".json"), stem.with_suffix(".npy")
    if not header.is_file() or not table.is_file():
        return False
    try:
        recorded = read_json(header, "header of the representation cache")["table_sha256"]
    except (UserError, KeyError, TypeError):
        return False
    return recorded == file_digest(table)


def _compute(
    language_model: LanguageModel,
    prompts: Sequence[str],
    spec: RepresentationSpec,
    stem: Path,
    key: dict[str, object],
    batch_size: int,
    report: Report,
) -> None:
    """Fill the cache file block by block, shortest prompts first; the header is written last."""
    encoder = PromptEncoder(language_model, prompts, spec)
    partial, progress_path = stem.with_suffix(".partial.npy"), stem.with_suffix(".partial.json")
    table, n_done = _begun(partial, progress_path, (len(prompts), encoder.width))
    batches = [encoder.order[start : start + batch_size] for start in range(n_done, len(prompts), batch_size)]
    since_checkpoint = 0
    for batch in report.progress(batches, unit="batch", desc="representations"):
        table[batch] = encoder.encode(batch)
        n_done, since_checkpoint = n_done + len(batch), since_checkpoint + len(batch)
        if since_checkpoint >= _CHECKPOINT_EVERY:
            table.flush()
            write_json(progress_path, {"n_done": n_done})
            since_checkpoint = 0
    table.flush()
    del table
    os.replace(partial, stem.with_suffix(".npy"))
    header = {"shape": [len(prompts), encoder.width], "dtype": "float32", "weights_sha256": language_model.digest}
    write_json(stem.with_suffix(".json"), {**key, **header, "table_sha256": file_digest(stem.with_suffix(".npy"))})
    progress_path.unlink(missing_ok=True)


def _begun(partial: Path, progress_path: Path, shape: tuple[int, int]) -> tuple[np.memmap, int]:
    """The table of an interrupted run and the number of its finished rows; a new one where none can be used."""
    if partial.is_file() and progress_path.is_file():
        with contextlib.suppress(UserError, LookupError, TypeError, ValueError, OSError):
            n_done = int(read_json(progress_path, "representation checkpoint")["n_done"])
            table = np.lib.format.open_memmap(partial, mode="r+")
            if table.shape == shape and table.dtype == np.float32 and 0 <= n_done <= shape[0]:
                return table, n_done
    # A checkpoint left from another table would call rows of this one done.
    progress_path.unlink(missing_ok=True)
    return _empty_table(partial, shape), 0


def _empty_table(path: Path, shape: tuple[int, int]) -> np.memmap:
    """A float32 table on disk to be filled. Its space is taken now: a mapped write to a full disk ends the process.

    Raises:
        UserError: the folder cannot be written or has not enough space.
    """
    try:
        table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with open(path, "r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; it takes {4 * shape[0] * shape[1] / 1e6:,.0f} MB"
        ) from error
    return table


class PromptEncoder:
    """Runs prompts through a model and pools one activation; tokens that all prompts begin with are run once."""

    def __init__(self, language_model: LanguageModel, prompts: Sequence[str], spec: RepresentationSpec) -> None:
        from lib.hook_sites import find_hook_site
        from lib.prefix import common_prefix_length, prefix_keys_and_values

        self.language_model = language_model
        self.ids = language_model.tokenize(prompts, max_len=spec.max_seq_len)
        self.order = sorted(range(len(prompts)), key=lambda i: (len(self.ids[i]), i))
        """Prompt numbers by length: what goes together in a batch."""
        self.pooling = Pooling(spec.pooling)
        self.space = Space(spec.space)
        self._site = find_hook_site(
            language_model, "ln_final.hook_out" if self.space is Space.LOGITS else spec.hook_name
        )
        # Every prompt keeps at least one token of its own.
        self._n_shared = min(common_prefix_length(self.ids), min(map(len, self.ids)) - 1)
        self._prefix, self._prefix_sum = None, None
        if self._n_shared:
            with self._captured() as activations:
                self._prefix = prefix_keys_and_values(language_model, self.ids[0][: self._n_shared])
            self._prefix_sum = activations[0][0].float().sum(dim=0)
        self.width = self.encode(self.order[:1]).shape[1]

    @contextlib.contextmanager
    def _captured(self) -> Iterator[list[torch.Tensor]]:
        activations: list[torch.Tensor] = []
        handle = self._site.watch(activations.append)
        try:
            yield activations
        finally:
            handle.remove()

    def encode(self, rows: Sequence[int]) -> np.ndarray:
        """Representations of some prompts (numbers), [prompt, width] float32."""
        import torch

        from lib.prefix import shared_cache

        tails = [self.ids[row][self._n_shared :] for row in rows]
        width = max(map(len, tails))
        tokens = torch.tensor([tail + [self.language_model.pad_token_id] * (width - len(tail)) for tail in tails])
        lengths = torch.tensor([len(tail) for tail in tails])
        is_real = torch.arange(width) < lengths[:, None]
        mask = torch.cat([torch.ones(len(rows), self._n_shared, dtype=torch.long), is_real.long()], dim=1)
        positions = (self._n_shared + torch.arange(width)).expand(len(rows), -1)
        device = self.language_model.device
        with torch.no_grad(), self._captured() as activations:
            cache = shared_cache(self._prefix, len(rows)) if self._prefix else None
            self.language_model.base(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                past_key_values=cache,
                use_cache=cache is not None,
            )
            pooled = self._pool(activations[0], is_real.to(device), lengths.to(device))
            if self.space is Space.LOGITS:
                # The unembedding is linear: the logits of the mean are the mean of the logits.
                pooled = self.language_model.lm_head(pooled.to(self.language_model.dtype))
        return pooled.float().cpu().numpy()

    def _pool(self, activation: torch.Tensor, is_real: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """[row, position, width] -> [row, width]; `lengths` counts tokens after the shared prefix."""
        import torch

        if self.pooling is Pooling.LAST:
            return activation[torch.arange(len(activation)), lengths - 1].float()
        total = torch.where(is_real[..., None], activation.float(), 0).sum(dim=1)
        if self._prefix_sum is not None:
            total = total + self._prefix_sum
        return total / (lengths + self._n_shared)[:, None]
