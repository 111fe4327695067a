"""The ablation engine against the naive loop: hooked greedy decoding from a cloned prompt cache, one group at a time.

Both run the packaged default model on two-shot sums, 64 datapoints per test, 3 new tokens, on the same groups, and must
give equal answers. Prints a table and one line of key=value pairs.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from lib.ablation_engine import AblationEngine
from lib.interventions import Intervention, ReplacementTable, build_table
from lib.modeling_and_ablation import LanguageModel, load_language_model
from lib.neurons import Neuron
from lib.packed_weights import pack_weights, packed_products

N_DATAPOINTS = 64
MAX_NEW_TOKENS = 3


def make_prompts(n: int, seed: int) -> list[str]:
    """Two-shot arithmetic prompts."""
    generator = np.random.default_rng(seed)
    prompts = [f"2+3=5; 9-2=7; {a}{o}{b}=" for a in range(18) for b in range(18) for o in "+-*"]
    return [prompts[i] for i in generator.permutation(len(prompts))[:n]]


class NaiveLoop:
    """Greedy decoding with a forward hook per layer, from a copy of the batch's prompt cache."""

    def __init__(self, lm: LanguageModel, prompts: Sequence[str], table: ReplacementTable) -> None:
        self.lm, self.table = lm, table
        ids = lm.tokenize(prompts)
        width = max(map(len, ids))
        self.tokens = torch.tensor([[lm.pad_token_id] * (width - len(row)) + row for row in ids])
        self.mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        self.lengths = self.mask.sum(1)
        with torch.inference_mode():
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)
            self.cache = lm.base(
                self.tokens[:, :-1], attention_mask=self.mask[:, :-1], position_ids=positions[:, :-1],
                past_key_values=DynamicCache(), use_cache=True,
            ).past_key_values  # fmt: skip

    def answers(self, group: Sequence[Neuron]) -> list[str]:
        """Answers of all datapoints with the group ablated at every answer-producing position."""
        return [self.lm.generation(row).answer for row in self.tokens_under(group, MAX_NEW_TOKENS)]

    def tokens_under(self, group: Sequence[Neuron], max_new_tokens: int) -> list[list[int]]:
        """Greedily decoded tokens of all datapoints under that ablation, stop tokens and what follows included."""
        lm = self.lm
        cache = copy.deepcopy(self.cache)
        token, mask = self.tokens[:, -1:], self.mask
        generated = []
        with torch.inference_mode():
            for step in range(max_new_tokens):
                positions = (self.lengths - 1 + step)[:, None]
                handles = self._hooks(group, positions)
                output = lm.model(
                    token, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                )
                for handle in handles:
                    handle.remove()
                token = output.logits[:, -1].argmax(-1, keepdim=True)
                generated.append(token)
                mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        return torch.cat(generated, 1).tolist()

    def _hooks(self, group: Sequence[Neuron], positions: torch.Tensor) -> list:
        handles = []
        for label in {neuron.layer_label for neuron in group}:
            indices = [neuron.index for neuron in group if neuron.layer_label == label]
            values = self.table.values(label, positions, torch.arange(len(positions)))[..., indices]

            def hook(module, inputs, output, indices=indices, values=values):  # noqa: ANN001, ANN202
                output[..., indices] = values
                return output

            handles.append(self.lm.mlp(int(label[1:])).register_forward_hook(hook))
        return handles


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def matmul_peak(n: int = 1536) -> float:
    """Best measured float32 matrix-product speed in FLOP/s with the current number of threads.

    Products with plain weights and with packed ones take part.
    """
    left, right = torch.randn(n, n), torch.nn.Linear(n, n, bias=False)
    weights = torch.nn.ModuleList([right])
    pack_weights(weights, weights, right.weight.nbytes)
    with torch.inference_mode():
        plain = min(seconds(lambda: right(left)) for _ in range(8))
        with packed_products(weights):
            packed = min(seconds(lambda: right(left)) for _ in range(8))
    return 2 * n**3 / min(plain, packed)


def packed_product_flops(left: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """FLOPs of a product with a packed weight, [..., input] times [output, input]; the counter does not know it."""
    return 2 * left.numel() * weight[0]


def compare(
    groups: list[list[Neuron]], expected: list[list[str]], engine: AblationEngine, naive: NaiveLoop, repeats: int
) -> dict:
    """Time both on the same groups, alternating; check the engine's answers against the naive loop's, `expected`."""
    datapoints = range(N_DATAPOINTS)
    result = engine.answers(groups, datapoints)
    actual = [[result.texts.get((g, d), engine.baseline_answers[d]) for d in datapoints] for g in range(len(groups))]
    naive_times, engine_times, peaks = [], [], []
    for _ in range(repeats):
        peaks.append(matmul_peak())
        naive_times.append(seconds(lambda: [naive.answers(group) for group in groups]))
        engine_times.append(seconds(lambda: engine.answers(groups, datapoints)))
    packed_product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    mapping = {packed_product: packed_product_flops} if packed_product else {}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        engine.answers(groups, datapoints)
    n_evaluations = len(groups) * N_DATAPOINTS
    return {
        "equal": actual == expected,
        "naive": n_evaluations / min(naive_times),
        "engine": n_evaluations / min(engine_times),
        "ratio": min(naive_times) / min(engine_times),
        "changed": float(result.changed.mean()),
        "peak_share": counter.get_total_flops() / min(engine_times) / max(peaks),
    }


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer groups, under two minutes")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="numbers of threads to measure")
    args = parser.parse_args()
    n_groups, repeats = (10, 1) if args.quick else (30, 2)
    lm = load_language_model("SmolLM2-135M-Instruct")
    prompts = make_prompts(N_DATAPOINTS, seed=0)
    table = build_table(lm, Intervention.MEAN_POSITIONAL, prompts, max_new_tokens=MAX_NEW_TOKENS)
    table.prepare([f"m{layer}" for layer in range(lm.n_layers)])
    engine = AblationEngine(lm, prompts, table, max_new_tokens=MAX_NEW_TOKENS)
    naive = NaiveLoop(lm, prompts, table)
    generator = np.random.default_rng(1)
    layers = np.linspace(0, lm.n_layers - 1, n_groups).round().astype(int)
    kinds = {
        "singles": [[Neuron(f"m{layer}", int(generator.integers(lm.d_model)))] for layer in layers],
        "groups of 32": [
            [Neuron(f"m{layer}", int(i)) for i in generator.choice(lm.d_model, 32, replace=False)]
            for layer in layers[::2]
        ],
    }
    expected = {name: [naive.answers(group) for group in groups] for name, groups in kinds.items()}
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name, groups in kinds.items():
            rows.append((threads, {"name": name, **compare(groups, expected[name], engine, naive, repeats)}))
    print(f"{'threads':>7} {'groups':14} {'naive/s':>9} {'engine/s':>9} {'ratio':>6} {'changed':>8} {'peak':>6} equal")
    for threads, row in rows:
        print(
            f"{threads:7d} {row['name']:14} {row['naive']:9.0f} {row['engine']:9.0f} {row['ratio']:6.2f} "
            f"{row['changed']:8.2%} {row['peak_share']:6.1%} {row['equal']}"
        )
    last = {row["name"]: row for _, row in rows}
    print(
        f"singles_ratio={last['singles']['ratio']:.2f} groups_ratio={last['groups of 32']['ratio']:.2f} "
        f"peak_share={last['singles']['peak_share']:.3f} equal={all(row['equal'] for _, row in rows)}"
    )


if __name__ == "__main__":
    main()
