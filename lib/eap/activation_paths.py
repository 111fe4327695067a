"""EAP-IG-activations: each component's own gradient, averaged along the path of its own write."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from lib.eap.attribution import clean_yardstick
from lib.eap.changes import prepare
from lib.eap.metrics import Yardstick
from lib.eap.pairs import PairBatch
from lib.eap.runs import Edit, Edits, Observation, Watch, adding, answer_logits, edit_of, run
from lib.eap.scores import AttributionSettings, WriteScores
from lib.interventions import ReplacementTable
from lib.modeling_and_ablation import LanguageModel


def activation_path_scores(
    language_model: LanguageModel,
    batch: PairBatch,
    settings: AttributionSettings,
    table: ReplacementTable | None,
    scores: WriteScores,
) -> None:
    """Adds one batch to `scores`. The heads of a layer move together, as one component; all others recompute."""
    observation, changes = prepare(language_model, batch, settings, table, Watch(attention=settings.with_heads))
    yardstick = clean_yardstick(language_model, batch, settings, observation)
    path = _Path(language_model, observation, yardstick, settings, batch.border)
    for layer, change in changes.mlp.items():
        gradient = path.mean_gradient(change, partial(edit_of, "mlp", layer))
        scores.add_mlp(layer, (change * gradient).sum(dim=1))
    for layer in changes.head_layers:
        change = changes.attention(language_model, layer)
        gradient = path.mean_gradient(change, partial(edit_of, "attention", layer))
        scores.add_heads(layer, changes.head_scores(language_model, layer, gradient))
    gradient = path.mean_gradient(changes.embedding, None)
    scores.add_embedding((changes.embedding * gradient).sum(dim=1))


class _Path:
    """Runs of one batch in which a single component moves from its clean write to the replacement."""

    def __init__(
        self,
        language_model: LanguageModel,
        observation: Observation,
        yardstick: Yardstick,
        settings: AttributionSettings,
        border: int,
    ) -> None:
        self.language_model = language_model
        self.alphas = torch.tensor(settings.alphas, device=language_model.device)
        n_points = len(settings.alphas)
        self.frame = observation.frame.repeated(n_points)
        self.embeddings = observation.clean.embeddings.repeat_interleave(n_points, 0)
        self.yardstick = yardstick.repeated(n_points)
        self.border = border

    def mean_gradient(self, change: torch.Tensor, edits: Callable[[Edit], Edits] | None) -> torch.Tensor:
        """Gradient at the moving component, averaged over the path, [pair, column, d_model].

        `edits` makes the run's arguments from the edit; None moves the token embeddings.
        """
        step = change[:, None] * self.alphas[None, :, None, None]
        step = step.flatten(0, 1).to(self.embeddings.dtype).requires_grad_()
        with torch.enable_grad():
            if edits is None:
                kept, _ = run(self.language_model, self.embeddings + step, self.frame, Watch(mlp=False))
            else:
                arguments = edits(adding(step))
                kept, _ = run(self.language_model, self.embeddings, self.frame, Watch(mlp=False), **arguments)
            logits = answer_logits(
                self.language_model, kept.final, self.yardstick.is_scored, self.frame.first, self.border
            )
            gradient = torch.autograd.grad(self.yardstick.measure(logits).sum(), step)[0]
        return gradient.float().unflatten(0, (-1, len(self.alphas))).mean(dim=1)
