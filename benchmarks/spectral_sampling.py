"""Time and memory of stage 4 on a large table whose representations are already cached.

359,401 arithmetic prompts, synthetic clustered representations 1536 wide, five rules, the flags of the default pipeline
(32 principal axes, 32 clusters, 512 length-matched pairs per rule, cover statistics). With `--quick`: 20,000 prompts.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from lib.cli import DEFAULT_MODEL, DEFAULT_SEED, rng  # noqa: E402

N_PROMPTS, WIDTH = 359_401, 1536
RULES = (
    "is_sum > 0.5",
    "left > 149.5",
    "right <= 20.5 & is_product > 0.5",
    "left <= 9.5 | right <= 9.5",
    "is_quotient > 0.5",
)


def write_inputs(folder: Path, n_prompts: int) -> None:
    """Feature table, rules, and the cache of representations under the key that stage 4 looks for."""
    import numpy as np
    import pandas as pd

    from lib.artifacts import file_digest, text_digest, write_csv, write_json
    from lib.modeling_and_ablation import model_identity
    from lib.representations import RepresentationSpec

    stream = rng(DEFAULT_SEED, "benchmark", "spectral sampling")
    problems = stream.permutation(4 * 300 * 300)[:n_prompts]
    operator, left, right = problems // 90_000, problems // 300 % 300, problems % 300
    prompts = [f"{a}{'+-*/'[o]}{b}=" for o, a, b in zip(operator, left, right, strict=True)]
    columns = {
        "left": left,
        "right": right,
        "is_sum": operator == 0,
        "is_product": operator == 2,
        "is_quotient": operator == 3,
    }
    frame = pd.DataFrame({name: np.asarray(values, dtype=float) for name, values in columns.items()})
    frame.insert(0, "prompt", prompts)
    frame["raw_output"] = (left + right).astype(str)
    frame["is_correct"] = operator == 0
    frame["is_test"] = stream.random(n_prompts) < 0.2
    write_csv(folder / "features" / "scores.csv", frame)
    write_json(folder / "features" / "features.json", [{"label": name} for name in columns])
    write_csv(folder / "rules" / "optimal_rule_set_is_correct.csv", pd.DataFrame({"rule_expression": RULES}))
    spec = RepresentationSpec(pooling="last")
    key = {"model": model_identity(DEFAULT_MODEL), "spec": asdict(spec), "prompts_sha256": text_digest(prompts)}
    stem = folder / "cache" / f"spectral_reps_{text_digest(key)[:16]}"
    stem.parent.mkdir()
    table = np.lib.format.open_memmap(stem.with_suffix(".npy"), "w+", np.float32, (n_prompts, WIDTH))
    centres = stream.standard_normal((64, WIDTH), dtype=np.float32)
    for start in range(0, n_prompts, 8192):
        own = operator[start : start + 8192] * 16 + left[start : start + 8192] % 16
        table[start : start + 8192] = centres[own] + stream.standard_normal((len(own), WIDTH), dtype=np.float32)
    table.flush()
    write_json(stem.with_suffix(".json"), {**key, "table_sha256": file_digest(stem.with_suffix(".npy"))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    n_prompts = 20_000 if args.quick else N_PROMPTS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, n_prompts)
        spec = importlib.util.spec_from_file_location("stage_4", REPOSITORY / "4_spectral_sample_datapoints.py")
        stage = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(stage)
        cpu, wall = time.process_time(), time.perf_counter()
        code = stage.main(
            ["--features_scores_dir", f"{folder}/features", "--rules_dir", f"{folder}/rules", "--rep_pooling", "last"]
            + ["--spectral_cache_dir", f"{folder}/cache", "--spectral_dim", "32", "--use_global_clusters"]
            + ["--global_n_clusters", "32", "--pair_by_similarity_len_matched", "--pair_similarity_metric", "euclidean"]
            + ["--min_points_per_ablation", "128", "--compute_cover_stats", "--output_path", f"{folder}/plan.json"]
        )
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{'prompts':>9}{'width':>7}{'rules':>7}{'CPU s':>8}{'wall s':>8}{'peak MB':>9}")
    print(f"{n_prompts:>9}{WIDTH:>7}{len(RULES):>7}{cpu:>8.1f}{wall:>8.1f}{peak:>9.0f}")
    print(f"exit_code={code} cpu_seconds={cpu:.1f} wall_seconds={wall:.1f} peak_mb={peak:.0f}")


if __name__ == "__main__":
    main()
