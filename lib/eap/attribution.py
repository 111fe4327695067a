"""Gradient attribution of writes into the residual stream: which coordinates carry the answer.

A coordinate's score is (replacement - clean value) x gradient of the metric there, summed over positions and pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from lib.cli import UserError
from lib.eap.changes import prepare
from lib.eap.metrics import Yardstick
from lib.eap.pairs import Pair, PairBatch, for_each_batch
from lib.eap.runs import Activations, Observation, Watch, answer_logits, mlp_norm, run
from lib.eap.scores import AttributionIntervention, AttributionSettings, GradientSite, Method, WriteScores
from lib.interventions import ReplacementTable
from lib.modeling_and_ablation import LanguageModel


def check_settings(settings: AttributionSettings) -> None:
    """Refuse combinations whose scores would mean nothing.

    Raises:
        UserError: says why and what to choose instead.
    """
    if settings.method is Method.EAP and not settings.metric.has_gradient_at_clean_input:
        raise UserError(
            "--method EAP with --metric kl: the divergence from the clean run has no gradient at the clean input, all "
            "scores would be rounding noise; use --metric log-prob or another method"
        )
    patching = settings.intervention is AttributionIntervention.PATCHING
    if not patching and settings.gradient_site is GradientSite.MLP_IN:
        raise UserError(
            "--mlp_grad_site mlp_in reproduces published scores and works with --intervention patching only"
        )


def attribute_writes(
    language_model: LanguageModel,
    pairs: Sequence[Pair],
    settings: AttributionSettings,
    *,
    batch_size: int,
    whole_writes: bool = False,
    table: ReplacementTable | None = None,
    progress: Iterable[int] = (),
) -> WriteScores:
    """Scores of all MLP-write (and head-write) coordinates, or of whole writes, summed over the pairs.

    table: replacement values for the mean interventions. progress: iterated once per pair.
    """
    check_settings(settings)
    if settings.method is Method.INFORMATION_FLOW_ROUTES:
        raise UserError("--method information-flow-routes scores edges; use it with --circuit_level edge")
    from lib.eap.activation_paths import activation_path_scores
    from lib.eap.exact import exact_scores

    one_batch = {Method.EAP_IG_ACTIVATIONS: activation_path_scores, Method.EXACT: exact_scores}.get(
        settings.method, input_path_scores
    )
    scores = WriteScores.empty(language_model, settings.with_heads, whole_writes)

    def work(batch: PairBatch) -> None:
        own = WriteScores.empty(language_model, settings.with_heads, whole_writes)
        one_batch(language_model, batch, settings, table, own)
        own.n_pairs = batch.n_pairs
        scores.merge(own)

    for_each_batch(pairs, batch_size, language_model, work, progress)
    return scores


def clean_yardstick(
    language_model: LanguageModel, batch: PairBatch, settings: AttributionSettings, observation: Observation
) -> Yardstick:
    """What the runs of this batch are measured against."""
    yardstick = Yardstick.of_batch(batch, settings.metric, settings.aggregation)
    with torch.no_grad():
        logits = answer_logits(
            language_model, observation.clean.final, yardstick.is_scored, observation.frame.first, batch.border
        )
    return yardstick.with_clean_logits(logits)


def input_path_scores(
    language_model: LanguageModel,
    batch: PairBatch,
    settings: AttributionSettings,
    table: ReplacementTable | None,
    scores: WriteScores,
) -> None:
    """EAP, EAP-IG-inputs and clean-corrupted: gradients at points between clean and corrupted token embeddings.

    All points of the path are rows of one batch. Adds to `scores`.
    """
    watch = Watch(mlp_inputs=settings.gradient_site is GradientSite.MLP_IN, attention=settings.with_heads)
    observation, changes = prepare(language_model, batch, settings, table, watch)
    yardstick = clean_yardstick(language_model, batch, settings, observation)
    alphas = torch.tensor(settings.alphas, device=language_model.device, dtype=torch.float32)
    n_points = len(alphas)
    # Rows: pair by pair, points of the path inside.
    step = changes.embedding.to(observation.clean.embeddings.dtype)
    points = observation.clean.embeddings[:, None] + alphas[None, :, None, None].to(step.dtype) * step[:, None]
    points = points.flatten(0, 1).requires_grad_()
    with torch.enable_grad():
        kept, _ = run(language_model, points, observation.frame.repeated(n_points), watch)
        repeated = yardstick.repeated(n_points)
        logits = answer_logits(language_model, kept.final, repeated.is_scored, observation.frame.first, batch.border)
        loss = repeated.measure(logits).sum()
        gradients = gradients_at_sites(language_model, loss, kept, settings)

    averaged = {site: g.float().unflatten(0, (-1, n_points)).mean(dim=1) for site, g in gradients.items()}
    for layer, change in changes.mlp.items():
        scores.add_mlp(layer, (change * averaged["mlp", layer]).sum(dim=1))
    for layer in changes.head_layers:
        scores.add_heads(layer, changes.head_scores(language_model, layer, averaged["attention", layer]))
    scores.add_embedding((changes.embedding * averaged["embedding", 0]).sum(dim=1))


def gradients_at_sites(
    language_model: LanguageModel, loss: torch.Tensor, kept: Activations, settings: AttributionSettings
) -> dict[tuple[str, int], torch.Tensor]:
    """Gradient of the loss, [row, column, d_model], at ("mlp", layer), ("attention", layer) and ("embedding", 0)."""
    at_input = settings.gradient_site is GradientSite.MLP_IN
    mlp_sites = kept.mlp_inputs if at_input else kept.mlp_outputs
    sites = {("embedding", 0): kept.embeddings}
    sites |= {("mlp", layer): tensor for layer, tensor in mlp_sites.items()}
    sites |= {("attention", layer): tensor for layer, tensor in kept.attention_outputs.items()}
    found = torch.autograd.grad(loss, list(sites.values()))
    gradients = dict(zip(sites, found, strict=True))
    if at_input:
        for layer, residual in kept.mlp_norm_inputs.items():
            gradients["mlp", layer] = _through_norm(mlp_norm(language_model, layer), residual, gradients["mlp", layer])
    return gradients


def _through_norm(norm: torch.nn.Module, residual: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient at a norm's input from the gradient at its output."""
    with torch.enable_grad():
        source = residual.detach().requires_grad_()
        return torch.autograd.grad(norm(source), source, gradient)[0]
