"""CPU time and memory of attribution: EAP-IG-inputs on MLP writes, 9-token prompts with 3 answer tokens, SmolLM2-135M.

Prints one row per setting, then, as `key=value`, CPU time and peak memory with all positions replaced and batches of 8.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.cli import DEFAULT_MODEL, DEFAULT_SEED, rng  # noqa: E402


def prompts(n: int, seed: int) -> list[str]:
    """Sums whose tokens are single characters: four digits, three digits, `+` and `=`."""
    stream = rng(seed, "benchmark", "attribution")
    return [f"{stream.integers(1000, 9999)}+{stream.integers(100, 999)}=" for _ in range(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ai_model", default=DEFAULT_MODEL)
    parser.add_argument("--n_pairs", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="8 pairs, default setting only")
    args = parser.parse_args()
    import torch

    from lib.eap.attribution import attribute_writes
    from lib.eap.pairs import Pair, sequences
    from lib.eap.scores import AttributionSettings, Method
    from lib.modeling_and_ablation import load_language_model

    lm = load_language_model(args.ai_model, device="cpu")
    n_pairs = 8 if args.quick else args.n_pairs
    texts = prompts(2 * n_pairs, DEFAULT_SEED)
    answered = sequences(lm, texts, [text[1:4] for text in texts])
    pairs = [Pair(*two) for two in zip(answered[:n_pairs], answered[n_pairs:], strict=True)]
    cases = [(Method.EAP_IG_INPUTS, decode_only, False, size) for decode_only in (False, True) for size in (1, 16)]
    cases += [(Method.EAP, True, False, 8), (Method.EAP_IG_INPUTS, True, True, 8)]
    headline = (Method.EAP_IG_INPUTS, False, False, 8)
    cases = [headline, (Method.EAP_IG_INPUTS, True, False, 8)] + ([] if args.quick else cases)
    print(
        f"{torch.get_num_threads()} threads, {n_pairs} pairs, {len(answered[0].prompt)} prompt tokens, "
        f"{len(answered[0].answer)} answer tokens"
    )
    print(f"{'method':<16}{'positions':<12}{'heads':<7}{'batch':>6}{'CPU s/pair':>12}{'wall s/pair':>13}{'peak MB':>9}")
    attribute_writes(lm, pairs[:2], AttributionSettings(), batch_size=2)
    for case in cases:
        method, decode_only, with_heads, batch_size = case
        settings = AttributionSettings(method, decode_only=decode_only, with_heads=with_heads)
        cpu, wall = time.process_time(), time.perf_counter()
        attribute_writes(lm, pairs, settings, batch_size=batch_size)
        cpu, wall = (time.process_time() - cpu) / n_pairs, (time.perf_counter() - wall) / n_pairs
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if case == headline:
            last_line = f"cpu_seconds_per_pair={cpu:.3f} peak_mb={peak:.0f}"
        positions = "answer" if decode_only else "all"
        heads = "yes" if with_heads else "no"
        print(f"{method.value:<16}{positions:<12}{heads:<7}{batch_size:>6}{cpu:>12.3f}{wall:>13.3f}{peak:>9.0f}")
    print(last_line)


if __name__ == "__main__":
    main()
