"""Attribution the slow way: one pair at a time, no batches, padding or shared prefix, heads' writes formed in full."""

from __future__ import annotations

import torch

from lib.eap.metrics import Metric
from lib.eap.pairs import Pair
from lib.eap.scores import AttributionSettings, GradientSite
from lib.modeling_and_ablation import LanguageModel


def mlp_norm(lm: LanguageModel, layer: int):
    block = lm.blocks[layer]
    for name in ("post_attention_layernorm", "ln_2", "ln_1"):
        if hasattr(block, name):
            return getattr(block, name)
    raise AssertionError("no norm")


class NaiveRun:
    """One forward pass over one sequence's embeddings, everything kept."""

    def __init__(self, lm: LanguageModel, embeddings: torch.Tensor, edits=None) -> None:
        self.embeddings = embeddings
        self.mlp_in, self.mlp_out, self.mix, self.attention_out, self.norm_in = {}, {}, {}, {}, {}
        handles = []
        for layer in range(lm.n_layers):
            handles += [
                mlp_norm(lm, layer).register_forward_pre_hook(self._keep_norm(layer)),
                lm.mlp(layer).register_forward_pre_hook(self._isolate(layer)),
                lm.mlp(layer).register_forward_hook(self._out(self.mlp_out, "mlp", layer, edits or {})),
                lm.attention_output(layer).register_forward_pre_hook(self._in(layer)),
                lm.attention_output(layer).register_forward_hook(
                    self._out(self.attention_out, "attention", layer, edits or {})
                ),
            ]
        self.logits = lm.model(inputs_embeds=embeddings[None]).logits[0]
        for handle in handles:
            handle.remove()

    def _keep_norm(self, layer):
        def hook(module, inputs):
            self.norm_in[layer] = inputs[0]

        return hook

    def _isolate(self, layer):
        def hook(module, inputs):
            self.mlp_in[layer] = inputs[0].clone()
            return (self.mlp_in[layer],)

        return hook

    def _in(self, layer):
        def hook(module, inputs):
            self.mix[layer] = inputs[0]

        return hook

    def _out(self, store, kind, layer, edits):
        def hook(module, inputs, output):
            if (kind, layer) in edits:
                output = output + edits[kind, layer][None]
            store[layer] = output
            return output

        return hook


class NaivePair:
    """A pair with its changes, position by position of the clean sequence."""

    def __init__(self, lm: LanguageModel, pair: Pair, settings: AttributionSettings, table=None) -> None:
        self.lm, self.pair, self.settings = lm, pair, settings
        self.clean_ids = torch.tensor(pair.clean.prompt + pair.clean.answer)
        self.corrupted_ids = torch.tensor(pair.corrupted.prompt + pair.corrupted.answer)
        embed = lm.model.get_input_embeddings()
        self.clean = NaiveRun(lm, embed(self.clean_ids))
        self.corrupted = NaiveRun(lm, embed(self.corrupted_ids))
        self.counterpart = {}
        shift = len(pair.corrupted.prompt) - len(pair.clean.prompt)
        for position in range(len(self.clean_ids)):
            if 0 <= position + shift < len(self.corrupted_ids):
                self.counterpart[position] = position + shift
        border = len(pair.clean.prompt)
        self.scored = list(range(border - 1, len(self.clean_ids) - 1))
        self.table = table

    def _is_replaced(self, position: int) -> bool:
        return not self.settings.decode_only or position in self.scored

    def change(self, clean: torch.Tensor, corrupted: torch.Tensor, label: str | None = None) -> torch.Tensor:
        """Replacement minus clean of an activation [position, width]."""
        result = torch.zeros_like(clean)
        for position in range(len(clean)):
            if not self._is_replaced(position):
                continue
            kind = self.settings.intervention.value
            if label is None or kind == "patching":
                if position in self.counterpart:
                    result[position] = corrupted[self.counterpart[position]] - clean[position]
            elif kind == "zero":
                result[position] = -clean[position]
            else:
                value = self.table.values(label, torch.tensor([[position]]), torch.tensor([0]))[0, 0]
                result[position] = value - clean[position]
        return result

    def embedding_change(self) -> torch.Tensor:
        return self.change(self.clean.embeddings, self.corrupted.embeddings)

    def mlp_change(self, layer: int) -> torch.Tensor:
        runs = (self.clean, self.corrupted)
        clean, corrupted = (self.lm.write(run.mlp_out[layer][0]) for run in runs)
        return self.change(clean, corrupted, f"m{layer}")

    def head_change(self, layer: int, head: int) -> torch.Tensor:
        own = slice(head * self.lm.d_head, (head + 1) * self.lm.d_head)
        weight = self.lm.head_output_weight(layer)[head]
        clean, corrupted = (self.lm.write(run.mix[layer][0][:, own] @ weight) for run in (self.clean, self.corrupted))
        return self.change(clean, corrupted, f"a{layer}.h{head}")

    def metric(self, run: NaiveRun) -> torch.Tensor:
        values = []
        for token, position in enumerate(self.scored):
            answer = self.pair.clean.answer[token]
            logits = run.logits[position]
            if self.settings.metric is Metric.LOG_PROB:
                values.append(-logits.log_softmax(-1)[answer])
            elif self.settings.metric is Metric.KL:
                clean = self.clean.logits[position].detach().log_softmax(-1)
                values.append((clean.exp() * (clean - logits.log_softmax(-1))).sum())
            elif token < len(self.pair.corrupted.answer) and self.pair.corrupted.answer[token] != answer:
                values.append(logits[self.pair.corrupted.answer[token]] - logits[answer])
        kind = self.settings.aggregation.value
        if not values:
            return run.logits.sum() * 0
        stacked = torch.stack(values)
        return {"mean": stacked.mean(), "none": stacked.sum(), "max": stacked.max(), "min": stacked.min()}[kind]


def naive_scores(lm: LanguageModel, pairs: list[Pair], settings: AttributionSettings, table=None):
    """(mlp [layer, d], heads [layer, head, d], embedding [d]) of an input-path method, summed over pairs."""
    mlp = torch.zeros(lm.n_layers, lm.d_model)
    heads = torch.zeros(lm.n_layers, lm.n_heads, lm.d_model)
    embedding = torch.zeros(lm.d_model)
    for pair in pairs:
        naive = NaivePair(lm, pair, settings, table)
        for alpha in settings.alphas:
            point = (naive.clean.embeddings + alpha * naive.embedding_change()).detach().requires_grad_()
            run = NaiveRun(lm, point)
            value = naive.metric(run)
            weight = 1 / len(settings.alphas)

            def gradient(tensor, value=value):
                found = torch.autograd.grad(value, tensor, retain_graph=True, allow_unused=True)[0]
                return torch.zeros_like(tensor) if found is None else found

            embedding += weight * (naive.embedding_change() * gradient(point)).sum(0)
            for layer in range(lm.n_layers):
                if settings.gradient_site is GradientSite.MLP_IN:
                    source = run.norm_in[layer].detach().requires_grad_()
                    through = mlp_norm(lm, layer)(source)
                    g = torch.autograd.grad(through, source, gradient(run.mlp_in[layer]))[0][0]
                else:
                    g = gradient(run.mlp_out[layer])[0]
                mlp[layer] += weight * (naive.mlp_change(layer) * g).sum(0)
                g = gradient(run.attention_out[layer])[0]
                for head in range(lm.n_heads):
                    heads[layer, head] += weight * (naive.head_change(layer, head) * g).sum(0)
    return mlp, heads, embedding
