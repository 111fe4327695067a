"""What an ablated coordinate becomes: zero, a mean, a donor's value; and the tables behind it.

All tables are in write space: coordinate j of what a component (`m12`, `a16.h21`) adds to the residual stream, measured
on reference prompts followed by the model's own answers. Positions count tokens without padding. Sums are in float64,
so they depend neither on the batch size nor on padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import torch

from lib.artifacts import read_npz, text_digest, write_npz
from lib.cli import UserError, rng
from lib.modeling_and_ablation import LanguageModel
from lib.neurons import parse_label


class Intervention(Enum):
    """Replacement for an ablated coordinate."""

    ZERO = "zero"
    """0."""

    MEAN = "mean"
    """The coordinate's mean over all reference tokens."""

    MEAN_POSITIONAL = "mean-positional"
    """Its mean over reference tokens at the same position; the plain mean where no reference token is."""

    MEAN_DONOR = "mean-donor"
    """The real value of this coordinate, among all reference tokens, that is nearest to its mean."""

    MEAN_DONOR_POSITIONAL = "mean-donor-positional"
    """The same among reference tokens at the same position."""

    RESAMPLE = "resample"
    """This coordinate's value in another reference datapoint (drawn once per datapoint) at the same position."""

    @property
    def is_positional(self) -> bool:
        """True if the value depends on the token's position."""
        return self in (Intervention.MEAN_POSITIONAL, Intervention.MEAN_DONOR_POSITIONAL, Intervention.RESAMPLE)


class DecodeScope(Enum):
    """Which positions an intervention touches under `--decode_only`."""

    ANSWER = "answer"
    """The last prompt token, whose logits give the first answer token, and every generated token."""

    GENERATED = "generated"
    """Generated tokens only: the first answer token cannot change. Compares with published runs."""


@dataclass
class ReplacementTable:
    """Replacement values of every coordinate of the components asked for, computed on first use of a component.

    lm: the model. reference_ids: token ids of each reference prompt with its answer. donor_of: for RESAMPLE, the
    reference number that each datapoint borrows from.
    """

    lm: LanguageModel
    intervention: Intervention
    reference_ids: list[list[int]]
    donor_of: torch.Tensor | None = None
    cache_dir: Path | None = None
    batch_size: int = 32
    _values: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def n_positions(self) -> int:
        """Number of positions that some reference token has."""
        return max(map(len, self.reference_ids), default=0)

    def prepare(self, labels: Iterable[str]) -> None:
        """Compute (or read from the cache) the tables of these components, all in one pass over the references."""
        missing = sorted(set(labels) - self._values.keys(), key=lambda label: (parse_label(label)[0], label))
        if not missing:
            return
        if self.intervention is Intervention.ZERO:
            self._values.update({label: torch.zeros(1, self.lm.d_model, device=self.lm.device) for label in missing})
            return
        path = self._cache_path(missing)
        if path is not None and path.is_file():
            stored = read_npz(path, "cache of replacement values")
            tables = {label: torch.from_numpy(stored[label]) for label in missing}
        else:
            tables = _compute_tables(self.lm, self.intervention, self.reference_ids, missing, self.batch_size)
            if path is not None:
                write_npz(path, **{label: table.numpy() for label, table in tables.items()})
        self._values.update({label: table.to(self.lm.device, torch.float32) for label, table in tables.items()})

    def values(self, label: str, positions: torch.Tensor, datapoints: torch.Tensor) -> torch.Tensor:
        """Replacement values [row, position, d_model] of a component.

        positions: token positions, [row, position]. datapoints: number of each row's datapoint, [row].
        """
        self.prepare([label])
        table = self._values[label]
        if self.intervention is Intervention.RESAMPLE:
            donors = self.donor_of.to(table.device)[datapoints]
            return table[donors[:, None], positions.clamp(max=table.shape[1] - 1)]
        if not self.intervention.is_positional:
            return table[0].expand(*positions.shape, -1)
        # The last row of a positional table is the plain mean, for positions that no reference token has.
        return table[positions.clamp(max=table.shape[0] - 1)]

    def _cache_path(self, labels: Sequence[str]) -> Path | None:
        if self.cache_dir is None or self.intervention is Intervention.RESAMPLE:
            return None
        key = text_digest([self.lm.digest, self.intervention.value, self.reference_ids, labels, "writes/1"])
        return self.cache_dir / f"replacement_values_{key[:16]}.npz"


def build_table(
    lm: LanguageModel,
    intervention: Intervention,
    reference_prompts: Sequence[str],
    *,
    max_new_tokens: int,
    prompts: Sequence[str] = (),
    seed: int = 0,
    cache_dir: Path | None = None,
    batch_size: int = 32,
) -> ReplacementTable:
    """The table of an intervention from reference prompts, each followed by the model's own greedy answer.

    prompts: the datapoints that will be ablated (RESAMPLE draws one other reference prompt for each).

    Raises:
        UserError: no reference prompts where some are needed.
    """
    if intervention is Intervention.ZERO:
        return ReplacementTable(lm, intervention, [])
    if not reference_prompts:
        raise UserError(f"--intervention {intervention.value} needs reference prompts, and the TRAIN split has none")
    answers = lm.generate(reference_prompts, max_new_tokens, batch_size=batch_size)
    prompt_ids = lm.tokenize(reference_prompts, max_len=lm.n_positions - max_new_tokens)
    ids = [prompt + list(answer.ids) for prompt, answer in zip(prompt_ids, answers, strict=True)]
    donor_of = _draw_donors(prompts, reference_prompts, seed) if intervention is Intervention.RESAMPLE else None
    return ReplacementTable(lm, intervention, ids, donor_of, cache_dir, batch_size)


def _draw_donors(prompts: Sequence[str], references: Sequence[str], seed: int) -> torch.Tensor:
    """For each prompt the number of a reference prompt with another text, [prompt]."""
    if len(set(references)) < 2:
        raise UserError("--intervention resample needs at least two different reference prompts")
    donors = []
    for prompt in prompts:
        generator = rng(seed, "resample", prompt)
        donor = int(generator.integers(len(references)))
        while references[donor] == prompt:
            donor = int(generator.integers(len(references)))
        donors.append(donor)
    return torch.tensor(donors, dtype=torch.long)


# ---------------------------------------------------------------- measuring writes


def iterate_writes(
    lm: LanguageModel, ids: Sequence[Sequence[int]], labels: Sequence[str], batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor, Callable[[str], torch.Tensor]]]:
    """Run sequences through the model and hand out the writes of components.

    Yields (sequence numbers, mask [row, position] of real tokens, write): `write(label)` is [row, position, d_model],
    float32, right-padded. Sequences of similar length share a batch.
    """
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    layers = sorted({parse_label(label) for label in labels}, key=lambda pair: (pair[0], pair[1] is None, pair[1] or 0))
    mlp_layers = sorted({layer for layer, head in layers if head is None})
    head_layers = sorted({layer for layer, head in layers if head is not None})
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(ids[i]) for i in chosen)
        tokens = torch.full((len(chosen), width), lm.pad_token_id)
        mask = torch.zeros(len(chosen), width, dtype=torch.bool)
        for row, i in enumerate(chosen):
            tokens[row, : len(ids[i])] = torch.tensor(list(ids[i]))
            mask[row, : len(ids[i])] = True
        outputs: dict[int, torch.Tensor] = {}
        mixes: dict[int, torch.Tensor] = {}
        handles = [lm.mlp(layer).register_forward_hook(_store_output(outputs, layer)) for layer in mlp_layers]
        handles += [
            lm.attention_output(layer).register_forward_pre_hook(_store_input(mixes, layer)) for layer in head_layers
        ]
        try:
            with torch.inference_mode():
                lm.base(tokens.to(lm.device), attention_mask=mask.to(lm.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        yield chosen, mask.to(lm.device), _write_reader(lm, outputs, mixes)


def _store_output(store: dict[int, torch.Tensor], layer: int) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        store[layer] = output

    return hook


def _store_input(store: dict[int, torch.Tensor], layer: int) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: tuple) -> None:
        store[layer] = inputs[0]

    return hook


def _write_reader(
    lm: LanguageModel, outputs: dict[int, torch.Tensor], mixes: dict[int, torch.Tensor]
) -> Callable[[str], torch.Tensor]:
    def write(label: str) -> torch.Tensor:
        layer, head = parse_label(label)
        if head is None:
            return lm.write(outputs[layer]).float()
        return head_write(lm, layer, head, mixes[layer]).float()

    return write


def head_write(lm: LanguageModel, layer: int, head: int, mix: torch.Tensor) -> torch.Tensor:
    """What one head adds to the residual stream, [..., d_model]; the output bias belongs to no head.

    mix: input of the output projection, [..., n_heads * d_head].
    """
    own = mix[..., head * lm.d_head : (head + 1) * lm.d_head]
    return lm.write(own @ lm.head_output_weight(layer)[head])


def _compute_tables(
    lm: LanguageModel, intervention: Intervention, ids: list[list[int]], labels: list[str], batch_size: int
) -> dict[str, torch.Tensor]:
    """Tables on the CPU: [1, d_model], positional [position + 1, d_model], RESAMPLE [reference, position, d_model]."""
    if intervention is Intervention.RESAMPLE:
        return _all_writes(lm, ids, labels, batch_size)
    means = _mean_tables(lm, ids, labels, batch_size)
    if intervention in (Intervention.MEAN_DONOR, Intervention.MEAN_DONOR_POSITIONAL):
        means = _nearest_values(lm, ids, means, batch_size)
    rows = slice(None) if intervention.is_positional else slice(-1, None)
    return {label: table[rows].float() for label, table in means.items()}


def _mean_tables(
    lm: LanguageModel, ids: list[list[int]], labels: list[str], batch_size: int
) -> dict[str, torch.Tensor]:
    """Per component the mean at each position and, in the last row, over all tokens: [position + 1, d_model]."""
    width = max(map(len, ids))
    sums = {label: torch.zeros(width, lm.d_model, dtype=torch.float64) for label in labels}
    counts = torch.zeros(width, dtype=torch.float64)
    for _, mask, write in iterate_writes(lm, ids, labels, batch_size):
        counts[: mask.shape[1]] += mask.sum(0).cpu().double()
        for label in labels:
            sums[label][: mask.shape[1]] += (write(label).double() * mask[..., None]).sum(0).cpu()
    tables = {}
    for label, total in sums.items():
        overall = total.sum(0, keepdim=True) / counts.sum()
        tables[label] = torch.cat([total / counts[:, None], overall])
    return tables


def _nearest_values(
    lm: LanguageModel, ids: list[list[int]], means: dict[str, torch.Tensor], batch_size: int
) -> dict[str, torch.Tensor]:
    """For each entry of the mean tables the observed value nearest to it (the first one on ties), float64."""
    best = {label: torch.full_like(table, torch.inf) for label, table in means.items()}
    donors = {label: table.clone() for label, table in means.items()}
    for _, mask, write in iterate_writes(lm, ids, list(means), batch_size):
        for label, table in means.items():
            values = write(label).double().cpu()
            for row in range(values.shape[0]):
                real = values[row, : int(mask[row].sum())]
                _keep_nearer(best[label], donors[label], table, real, slice(0, real.shape[0]))
                overall = (real - table[-1]).abs().argmin(0, keepdim=True)
                _keep_nearer(best[label], donors[label], table, real.gather(0, overall), slice(-1, None))
    return donors


def _keep_nearer(
    best: torch.Tensor, donors: torch.Tensor, table: torch.Tensor, values: torch.Tensor, rows: slice
) -> None:
    distance = (values - table[rows]).abs()
    nearer = distance < best[rows]
    best[rows] = torch.where(nearer, distance, best[rows])
    donors[rows] = torch.where(nearer, values, donors[rows])


def _all_writes(lm: LanguageModel, ids: list[list[int]], labels: list[str], batch_size: int) -> dict[str, torch.Tensor]:
    """Every reference token's write, [reference, position, d_model]; past its end a reference repeats its last."""
    width = max(map(len, ids))
    tables = {label: torch.zeros(len(ids), width, lm.d_model) for label in labels}
    for chosen, mask, write in iterate_writes(lm, ids, labels, batch_size):
        for label in labels:
            values = write(label).cpu()
            for row, i in enumerate(chosen):
                length = int(mask[row].sum())
                tables[label][i, :length] = values[row, :length]
                tables[label][i, length:] = values[row, length - 1]
    return tables
