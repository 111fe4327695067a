"""Do attribution scores order neurons as their real ablation does? Each method against exact single ablations.

Model: SmolLM2-135M. Rule: sums against other operators, two-shot arithmetic, operands 0..17. Truth, for uniformly drawn
MLP-write coordinates: the flip rate (right -> wrong) on correctly answered sums, and the mean absolute change of the
answer's log-probability, both under stage 6's default ablation (mean-positional, answer positions). Prints, for each
method, Spearman's rank correlation of its ranking with both, the overlap of the top 100 with the exact top 100 (by
log-probability change), and the area under the ROC curve for units that flip at least 1 in 20. Rankings are by the
|signed sum| over pairs, as published, and, marked |.|, by the sum over pairs of |score|.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.cli import DEFAULT_MODEL, DEFAULT_SEED, rng  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

    from lib.eap.pairs import Pair
    from lib.eap.scores import AttributionSettings
    from lib.interventions import ReplacementTable
    from lib.modeling_and_ablation import LanguageModel

N_TOP = 100
DEFAULT_RANKING = "EAP-IG-inputs mean-pos |.|"
"""What the pipeline ranks by: magnitudes of the replacement that is ablated."""
MAX_NEW_TOKENS = 3


def make_pairs(lm: LanguageModel, n_pairs: int) -> tuple[list[str], list[Pair]]:
    """Correctly answered sums, each with another operator's prompt of equal token length: (sums, pairs)."""
    import numpy as np

    from lib.eap.pairs import Pair, sequences
    from lib.task_spec import resolve_task_spec

    stream = rng(DEFAULT_SEED, "benchmark", "quality")
    task = resolve_task_spec("lib.tasks.arithmetic_task")
    texts = {o: [f"2+3=5; 9-2=7; {a}{o}{b}=" for a in range(18) for b in range(18)] for o in "+-*"}
    sums = [texts["+"][i] for i in stream.permutation(len(texts["+"]))[: 4 * n_pairs]]
    answers = [generation.answer for generation in lm.generate(sums, MAX_NEW_TOKENS)]
    right = np.flatnonzero(task.is_answer_positive([{"prompt": text} for text in sums], answers))[:n_pairs]
    clean = sequences(lm, [sums[i] for i in right], [answers[i] for i in right])
    others = [text for o in "-*" for text in texts[o]]
    others = [others[i] for i in stream.permutation(len(others))]
    lengths = [len(ids) for ids in lm.tokenize(others)]
    chosen = []
    for item in clean:
        place = lengths.index(len(item.prompt))
        chosen.append(others.pop(place))
        lengths.pop(place)
    corrupted = sequences(lm, chosen, [generation.answer for generation in lm.generate(chosen, MAX_NEW_TOKENS)])
    return [sums[i] for i in right], [Pair(*two) for two in zip(clean, corrupted, strict=True)]


def exact_flip_rates(
    lm: LanguageModel, sums: list[str], units: list[tuple[str, int]], table: ReplacementTable
) -> np.ndarray:
    """Share of the sums whose answer turns wrong when a unit is ablated, [unit]."""
    from lib.ablation_engine import AblationEngine
    from lib.flip_oracle import FlipOracle
    from lib.neurons import Neuron
    from lib.task_spec import resolve_task_spec

    task = resolve_task_spec("lib.tasks.arithmetic_task")
    engine = AblationEngine(lm, sums, table, max_new_tokens=MAX_NEW_TOKENS, is_complete=task.answer_is_complete)
    oracle = FlipOracle(engine, task.is_answer_positive, [{"prompt": text} for text in sums])
    return oracle.flips([[Neuron(*unit)] for unit in units], list(range(len(sums)))).mean(axis=1)


def methods() -> dict[str, AttributionSettings]:
    """What is compared."""
    from lib.eap.metrics import Metric
    from lib.eap.scores import AttributionIntervention, AttributionSettings, GradientSite, Method

    means = AttributionIntervention.MEAN_POSITIONAL
    base = {"decode_only": True}
    return {
        "EAP-IG-inputs": AttributionSettings(**base),
        "EAP-IG-inputs mlp_in": AttributionSettings(gradient_site=GradientSite.MLP_IN, **base),
        "EAP-IG-inputs mlp_in kl": AttributionSettings(
            gradient_site=GradientSite.MLP_IN, metric=Metric.KL, n_steps=3, **base
        ),
        "EAP-IG-inputs kl": AttributionSettings(metric=Metric.KL, **base),
        "EAP-IG-inputs logit-diff": AttributionSettings(metric=Metric.LOGIT_DIFF, **base),
        "EAP-IG-inputs all positions": AttributionSettings(),
        "EAP-IG-inputs mean-pos": AttributionSettings(intervention=means, **base),
        "EAP": AttributionSettings(Method.EAP, **base),
        "EAP mean-pos": AttributionSettings(Method.EAP, intervention=means, **base),
        "EAP zero": AttributionSettings(Method.EAP, intervention=AttributionIntervention.ZERO, **base),
        "EAP-IG-activations": AttributionSettings(Method.EAP_IG_ACTIVATIONS, **base),
        "EAP-IG-activations mean-pos": AttributionSettings(Method.EAP_IG_ACTIVATIONS, intervention=means, **base),
        "clean-corrupted": AttributionSettings(Method.CLEAN_CORRUPTED, **base),
    }


def area_under_curve(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Probability that a positive has the larger score."""
    from scipy.stats import rankdata

    n_positive = int(is_positive.sum())
    if n_positive in (0, len(scores)):
        return float("nan")
    ranks = rankdata(scores)[is_positive].sum()
    return float((ranks - n_positive * (n_positive + 1) / 2) / (n_positive * (len(scores) - n_positive)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ai_model", default=DEFAULT_MODEL)
    parser.add_argument("--n_units", type=int, default=1000)
    parser.add_argument("--n_pairs", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="200 units, 8 pairs")
    args = parser.parse_args()
    if args.quick:
        args.n_units, args.n_pairs = 200, 8
    import numpy as np
    from scipy.stats import spearmanr

    from lib.eap.attribution import attribute_writes
    from lib.eap.order_check import ablation_effects
    from lib.eap.scores import AttributionIntervention, AttributionSettings
    from lib.interventions import Intervention, ReplacementTable
    from lib.modeling_and_ablation import load_language_model

    lm = load_language_model(args.ai_model, device="cpu")
    sums, pairs = make_pairs(lm, args.n_pairs)
    references = [list(side.prompt + side.answer) for pair in pairs for side in pair]
    table = ReplacementTable(lm, Intervention.MEAN_POSITIONAL, references)
    drawn = np.sort(
        rng(DEFAULT_SEED, "benchmark", "units").choice(lm.n_layers * lm.d_model, args.n_units, replace=False)
    )
    units = [(f"m{unit // lm.d_model}", int(unit % lm.d_model)) for unit in drawn]
    start = time.process_time()
    truth_settings = AttributionSettings(intervention=AttributionIntervention.MEAN_POSITIONAL, decode_only=True)
    effects = np.abs(ablation_effects(lm, pairs, units, truth_settings, table, batch_size=32)).mean(axis=1)
    flip_rates = exact_flip_rates(lm, sums, units, table)
    print(
        f"{len(units)} units, {len(pairs)} pairs, exact ablations: {time.process_time() - start:.0f} CPU s; "
        f"{int((flip_rates > 0).sum())} units flip something, {int((flip_rates >= 0.05).sum())} at least 1 in 20"
    )
    print(f"{'method':<32}{'rho(log-prob)':>14}{'rho(flips)':>12}{'top-100':>9}{'AUC flips':>11}{'CPU s/pair':>12}")
    exact_top = set(np.argsort(-effects, kind="stable")[:N_TOP].tolist())
    rows = {}
    for name, settings in methods().items():
        cpu = time.process_time()
        needs_table = settings.intervention is AttributionIntervention.MEAN_POSITIONAL
        scores = attribute_writes(lm, pairs, settings, batch_size=8, table=table if needs_table else None)
        cpu = (time.process_time() - cpu) / len(pairs)
        for ranking, table_of_scores in (("", scores.signed), (" |.|", scores.magnitude)):
            found = np.abs(table_of_scores.mlp.cpu().numpy().ravel()[drawn])
            top = len(exact_top & set(np.argsort(-found, kind="stable")[:N_TOP].tolist())) / N_TOP
            row = (spearmanr(found, effects)[0], spearmanr(found, flip_rates)[0], top)
            auc = area_under_curve(found, flip_rates >= 0.05)
            label = name + ranking
            print(f"{label:<32}{row[0]:>14.3f}{row[1]:>12.3f}{top:>9.2f}{auc:>11.3f}{cpu:>12.3f}", flush=True)
            rows[label] = row
    self_agreement = spearmanr(effects, flip_rates)[0]
    print(
        f"{'(exact log-prob change)':<32}{1:>14.3f}{self_agreement:>12.3f}{1:>9.2f}"
        f"{area_under_curve(effects, flip_rates >= 0.05):>11.3f}"
    )
    default, compatible = rows[DEFAULT_RANKING], rows["EAP-IG-inputs mlp_in"]
    print(f"spearman_default={default[0]:.3f} spearman_mlp_in={compatible[0]:.3f} top100_overlap={default[2]:.2f}")


if __name__ == "__main__":
    main()
