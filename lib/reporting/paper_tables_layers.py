"""Tables 10 and 11: the strongest neurons by attribution and by ablation, and the layers they are in."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import pandas as pd

from lib.reporting.artifacts import Reading, RunFolder, Status, expect, read_json
from lib.reporting.localization import circuit_dir
from lib.reporting.naming import RunMode
from lib.reporting.paper_tables import PaperContext
from lib.reporting.tables import Table

_KEY = re.compile(r"\(\s*['\"](?P<label>m\d+)['\"]\s*,\s*(?P<index>\d+)\s*\)\Z", re.ASCII)
_RANKED_BY = {"c2i": ("c2i", "flip_any"), "i2c": ("i2c", "flip_any"), "flip_any": ("flip_any", "c2i")}


class Attributed(NamedTuple):
    """An MLP neuron with its strongest attribution over the circuits."""

    neuron: str
    strength: float
    circuit_id: Any


def attribution_manifest(run: RunFolder) -> Reading[list]:
    """Stage 5's manifest of the run, in any of the places where it was ever written."""
    folder = circuit_dir(run)
    if folder is None or run.name is None:
        return Reading(Status.MISSING, reason="no circuit folder follows from the run's name", path=run.path)
    other = folder.with_name(folder.name.replace("-decode_only", ""))
    bag = run.name.bag_label
    places = [
        base / below for base in (folder, other) for below in ("neural_circuits", ".", f"{bag}/neural_circuits", bag)
    ]
    path = next(
        (place / "manifest.json" for place in places if (place / "manifest.json").is_file()),
        places[0] / "manifest.json",
    )
    return expect(read_json(path), list, "manifest.json")


def strongest_attributions(manifest: list) -> list[Attributed]:
    """MLP neurons, strongest first: the manifest's ranking magnitude where it has one, else |score|; best circuit."""
    best: dict[str, Attributed] = {}
    for entry in manifest:
        topn = (entry.get("metadata_topn") or {}) if isinstance(entry, dict) else {}
        scores = topn.get("neuron_label_magnitude") or topn.get("neuron_label_score") or {}
        for key, score in scores.items():
            match = _KEY.match(key)
            if match is None or not isinstance(score, int | float) or not math.isfinite(score):
                continue
            neuron = f"{match['label']}:{match['index']}"
            if neuron not in best or abs(score) > best[neuron].strength:
                best[neuron] = Attributed(neuron, abs(float(score)), entry.get("circuit_id"))
    return sorted(best.values(), key=lambda item: (-item.strength, _place(item.neuron)))


def strongest_flippers(frame: pd.DataFrame, metric: str) -> list[str]:
    """Neurons of `flip_stats_by_neuron.csv`, most flips first; ties in order of layer and index."""
    frame = frame.assign(neuron=_names(frame))
    columns = [f"{name}_{kind}" for name in _RANKED_BY[metric] for kind in ("rate", "count")]
    keys = [
        pd.to_numeric(frame[name], errors="coerce").fillna(-1.0) if name in frame else pd.Series(-1.0, frame.index)
        for name in columns
    ]
    ranks = [tuple(-key.loc[row] for key in keys) for row in frame.index]
    order = sorted(zip(ranks, frame["neuron"], strict=True), key=lambda item: (item[0], _place(item[1])))
    return [neuron for _, neuron in order]


def _names(frame: pd.DataFrame) -> list[str]:
    """`m12:345` of each row, from whichever identity columns there are."""
    if "neuron" in frame:
        return [str(name) for name in frame["neuron"]]
    label = next((name for name in ("layer_label", "layer_key") if name in frame), None)
    if label is None or "neuron_id" not in frame:
        return [""] * len(frame)
    return [f"{layer}:{int(index)}" for layer, index in zip(frame[label], frame["neuron_id"], strict=True)]


def _place(neuron: str) -> tuple:
    """Sort key: layer, then index, then text."""
    numbers = [int(number) for number in re.findall(r"\d+", neuron)]
    return (numbers[:1], numbers[1:], neuron)


def _layer(neuron: str) -> str:
    return neuron.partition(":")[0]


def _index(neuron: str) -> int | None:
    text = neuron.rpartition(":")[2]
    return int(text) if text.isdigit() else None


# ---------------------------------------------------------------- the tables


class Strongest(NamedTuple):
    """Both rankings of one model's main run; where says which, for the caption."""

    attributed: list[Attributed]
    flippers: list[str]
    where: str


def _both(context: PaperContext, number: str) -> Strongest:
    args = context.args
    root = context.root_for(
        getattr(args, f"table{number}_task"), getattr(args, f"table{number}_model"), f"--table{number}_model"
    )
    run = context.run_of(root, RunMode.SPECTRAL_PLAN)
    manifest = context.session.take(run, attribution_manifest(run), "neural_circuits/manifest.json")
    table = context.session.take(run, run.by_neuron, "flip_stats_by_neuron.csv")
    n = getattr(args, f"table{number}_topn")
    attributed = strongest_attributions(manifest.value)[:n] if manifest.is_usable and manifest.value else []
    flippers = strongest_flippers(table.value, args.cha_rank_metric)[:n] if table.is_usable and len(table.value) else []
    return Strongest(attributed, flippers, f"{root.unit}, main run")


def table_10(context: PaperContext) -> int:
    """How many of the strongest neurons lie in each layer."""
    n = context.args.table10_topn
    attributed, flippers, where = _both(context, "10")
    by_attribution = pd.Series([_layer(item.neuron) for item in attributed], dtype=object).value_counts()
    by_ablation = pd.Series([_layer(neuron) for neuron in flippers], dtype=object).value_counts()
    layers = sorted(
        set(by_attribution.index) | set(by_ablation.index),
        key=lambda layer: (-by_ablation.get(layer, 0), -by_attribution.get(layer, 0), _place(layer)),
    )
    columns = ["Layer", f"EAP-IG top-{n}", f"CHA top-{n}"]
    rows = [
        (layer, _share(by_attribution.get(layer, 0), len(attributed)), _share(by_ablation.get(layer, 0), len(flippers)))
        for layer in layers
    ]
    frame = pd.DataFrame(rows, columns=columns)
    context.write(
        Table(
            "table10_layer_concentration",
            frame,
            f"Layers of the strongest neurons by attribution (EAP-IG) and by flips (CHA, "
            f"{context.args.cha_rank_metric}). {where}.",
        )
    )
    context.session.csv(
        "table10_eapig_top_neurons.csv",
        pd.DataFrame(
            [
                (item.neuron, _layer(item.neuron), _index(item.neuron), item.strength, item.circuit_id)
                for item in attributed
            ],
            columns=["neuron", "layer", "neuron_id", "abs_ig", "source_circuit_id"],
        ),
    )
    context.session.csv(
        "table10_cha_top_neurons.csv",
        pd.DataFrame(
            [(neuron, _layer(neuron), _index(neuron)) for neuron in flippers], columns=["neuron", "layer", "neuron_id"]
        ),
    )
    return len(frame)


def _share(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.1f}%)" if total else "0"


def table_11(context: PaperContext) -> int:
    """The strongest neurons side by side."""
    attributed, flippers, where = _both(context, "11")
    rows = []
    for rank in range(max(len(attributed), len(flippers))):
        item = attributed[rank] if rank < len(attributed) else None
        rows.append(
            (
                rank + 1,
                item.neuron if item else "",
                f"{item.strength:.5f}" if item else "",
                flippers[rank] if rank < len(flippers) else "",
            )
        )
    frame = pd.DataFrame(rows, columns=["Rank", "EAP-IG neuron", "|IG|", "CHA neuron"])
    context.write(
        Table(
            "table11_top10_eapig_vs_cha",
            frame,
            f"Strongest neurons by attribution and by flips ({context.args.cha_rank_metric}). {where}.",
        )
    )
    return len(frame)
