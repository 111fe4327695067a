"""What neurons do at the position where an ablation begins: their activation, and what the answer's margin owes them.

The position is the first one that the intervention touches and whose logits decide an answer token. The margin is that
token's logit minus the best other one, so it is positive before ablation and the token changes where it turns negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lib.eap.runs import Activations, Frame, Watch, run
from lib.engine_state import Site
from lib.interventions import ReplacementTable, head_write
from lib.modeling_and_ablation import LanguageModel
from lib.neurons import parse_label


class SiteMeasurements(NamedTuple):
    """Per component label, float32 [site, d_model], in write space."""

    margins: torch.Tensor
    """[site]"""
    activations: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    """Of the margin by the activation."""
    replacements: dict[str, torch.Tensor]
    """What an ablation puts there."""


def measure_sites(
    lm: LanguageModel, table: ReplacementTable, sites: Sequence[Site], labels: Sequence[str], batch_size: int = 64
) -> SiteMeasurements:
    """Measure components at sites. Nothing behind a site matters, and of what is before it only keys and values do."""
    order = sorted(range(len(sites)), key=lambda i: (len(sites[i].ids), i))
    margins = torch.zeros(len(sites))
    parts = tuple({label: torch.zeros(len(sites), lm.d_model) for label in labels} for _ in range(3))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _measure_batch(lm, table, [sites[i] for i in chosen], labels)
        margins[chosen] = batch.margins
        for whole, part in zip(parts, batch[1:], strict=True):
            for label in labels:
                whole[label][chosen] = part[label]
    return SiteMeasurements(margins, *parts)


def _measure_batch(
    lm: LanguageModel, table: ReplacementTable, sites: Sequence[Site], labels: Sequence[str]
) -> SiteMeasurements:
    width = max(len(site.ids) for site in sites)
    tokens = torch.full((len(sites), width), lm.pad_token_id)
    is_real = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, site in enumerate(sites):
        tokens[row, width - len(site.ids) :] = torch.tensor(site.ids)
        is_real[row, width - len(site.ids) :] = True
    tokens, is_real = tokens.to(lm.device), is_real.to(lm.device)
    positions = (is_real.long().cumsum(dim=-1) - 1).clamp(min=0)
    components = [parse_label(label) for label in labels]
    watch = Watch(attention=any(head is not None for _, head in components))
    kept, margins = _last_column(lm, tokens, is_real, positions, [site.answer for site in sites], watch)
    outputs = [(kept.mlp_outputs if head is None else kept.attention_outputs)[layer] for layer, head in components]
    gradients = torch.autograd.grad(margins.sum(), outputs)
    last, datapoints = positions[:, -1:], torch.tensor([site.datapoint for site in sites], device=lm.device)
    activations, replacements = {}, {}
    for label, (layer, head), output in zip(labels, components, outputs, strict=True):
        write = lm.write(output) if head is None else head_write(lm, layer, head, kept.mixes[layer])
        activations[label] = write[:, 0].detach().float().cpu()
        replacements[label] = table.values(label, last, datapoints)[:, 0].float().cpu()
    slopes = {label: gradient[:, 0].float().cpu() for label, gradient in zip(labels, gradients, strict=True)}
    return SiteMeasurements(margins.detach().cpu(), activations, slopes, replacements)


def _last_column(
    lm: LanguageModel,
    tokens: torch.Tensor,
    is_real: torch.Tensor,
    positions: torch.Tensor,
    answers: Sequence[int],
    watch: Watch,
) -> tuple[Activations, torch.Tensor]:
    """Activations of the last column [row, 1, width] with their graph, and the margin [row] of the answer tokens."""
    embed, width = lm.model.get_input_embeddings(), tokens.shape[1]
    prefix = None
    if width > 1:
        head = Frame(0, is_real[:, :-1], positions[:, :-1], None)
        with torch.no_grad():
            _, prefix = run(lm, embed(tokens[:, :-1]), head, Watch(mlp=False), keep_cache=True)
    embeddings = embed(tokens[:, -1:]).detach().requires_grad_()
    kept, _ = run(lm, embeddings, Frame(width - 1, is_real, positions, prefix), watch)
    logits = lm.lm_head(kept.final[:, 0]).float()
    answer = torch.tensor(answers, device=lm.device)[:, None]
    others = logits.scatter(1, answer, -torch.inf)
    return kept, (logits.gather(1, answer)[:, 0] - others.amax(dim=1))
