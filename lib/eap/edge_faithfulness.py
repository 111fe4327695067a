"""Circuits of edges: each reader sees the clean writes along the circuit's edges, replacements along all others."""

from __future__ import annotations

from dataclasses import replace

import torch

from lib.eap.faithfulness import BatchEvaluation, Keep
from lib.eap.runs import Activations, Watch, run
from lib.eap.split_inputs import READERS, split_inputs, ungrouped


class EdgeEvaluation(BatchEvaluation):
    """Ablated runs of one batch's clean side, edge by edge. Without heads: edges among input, MLPs and logits only."""

    def ablated_logits(self, keep: Keep) -> torch.Tensor:
        """Logits at the scored tokens when every edge outside `keep` carries its replacement."""
        clean = self.observation.clean.embeddings
        removed = torch.from_numpy(self.layout.edges()).to(clean.device) & ~keep.mask
        if not keep.with_heads:
            heads = torch.from_numpy(~self.layout.is_mlp()).to(clean.device)
            heads[0] = False
            removed &= ~heads[:, None]
        if not self.patching or (keep.embedding and not keep.with_heads):
            removed[0] = False
        kept = Activations(clean)

        def shift(kind: str, layer: int) -> torch.Tensor | None:
            if kind in READERS and not keep.with_heads:
                return None
            mask = removed[:, self.layout.reader_columns(kind, layer)]
            rows = mask.any(dim=1).nonzero()[:, 0].tolist()
            if not rows:
                return None
            changes = torch.stack([self._change(row, kept) for row in rows], dim=1)
            total = torch.einsum("pucd,uv->pvcd", changes, mask[rows].to(changes.dtype))
            return total if kind in READERS else total[:, 0]

        frame = self.observation.frame
        frame = replace(frame, prefix=ungrouped(frame.prefix, self.language_model.n_heads))
        with torch.no_grad(), split_inputs(self.language_model, shift):
            run(self.language_model, clean, frame, Watch(attention=keep.with_heads), kept=kept)
        return self._logits(kept.final).float()

    def _change(self, row: int, kept: Activations) -> torch.Tensor:
        """Replacement minus what a component writes in the current pass, [pair, column, d_model]."""
        lm, corrupted = self.language_model, self.observation.corrupted
        if row == 0:
            return torch.where(self.replaced, corrupted.embeddings - kept.embeddings, 0.0).float()
        layer, place = divmod(row - 1, self.layout.n_heads + 1)
        if place == self.layout.n_heads:
            current = lm.write(kept.mlp_outputs[layer])
            new = lm.write(corrupted.mlp_outputs[layer]) if self.patching else self._table_values(f"m{layer}", current)
        else:
            weight = lm.head_output_weight(layer)[place]
            own = slice(place * lm.d_head, (place + 1) * lm.d_head)
            current = lm.write(kept.mixes[layer][..., own] @ weight)
            if self.patching:
                new = lm.write(corrupted.mixes[layer][..., own] @ weight)
            else:
                new = self._table_values(f"a{layer}.h{place}", current)
        return torch.where(self.replaced, new - current, 0.0).float()
