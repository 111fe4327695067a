"""Candidates of stage 7: reading, judging, ordering, and the rows earlier stages used."""

import json
import math
import zipfile

import numpy as np
import pytest

from lib.cli import UserError
from lib.flip_candidates import (
    CandidateFilter,
    CatastrophicPolicy,
    Verdict,
    discovery_rows,
    read_candidates,
    select_candidates,
)
from lib.scores_table import load_scores
from tests.flip_world import TASK_SPEC, world_frame, write_world


def _write(folder, entries, catastrophic=None):
    folder.mkdir(parents=True, exist_ok=True)
    agonists = {name: {"last_record": record} for name, record in entries.items()}
    content = {"catastrophic_zero": catastrophic or {}, "non_catastrophic_agonists": agonists}
    (folder / "neuron_buckets.json").write_text(json.dumps(content))


def _names(judged, verdict=Verdict.KEPT):
    return [str(candidate.neuron) for candidate, given in judged if given is verdict]


def test_order_is_by_confirmed_then_observed_then_bound_then_place(tmp_path):
    _write(
        tmp_path,
        {
            "m3:1": {"max_effect": 0.5},
            "a3.h1:1": {"max_effect": 0.5},
            "m9:0": {"max_effect": 0.9, "confirmed_rate": 0.1},
            "m1:0": {"max_effect": 0.4, "confirmed_rate": 0.8},
            "m2:0": {"max_effect": 0.6, "observed_rate": 0.55},
        },
    )
    # 0.8 confirmed, 0.55 observed, 0.5 twice (heads before their MLP), 0.1 confirmed although its bound is 0.9.
    assert [str(item.neuron) for item in read_candidates(tmp_path)] == ["m1:0", "m2:0", "a3.h1:1", "m3:1", "m9:0"]


def test_each_rejection_names_its_reason(tmp_path):
    _write(
        tmp_path,
        {
            "m0:0": {"max_effect": 0.9},
            "m0:1": {"max_effect": 0.1},
            "m0:2": {},
            "m0:3": {"max_effect": 0.5},
            "m0:4": {"max_effect": 0.4, "confirmed_rate": 0.05},
            "m0:5": {"max_effect": -0.3},
        },
        {"confirmed": {"m0:0": {}}},
    )
    judged = select_candidates(read_candidates(tmp_path), CandidateFilter(0.2, min_confirmed_rate=0.1, max_neurons=1))
    verdicts = {str(candidate.neuron): verdict for candidate, verdict in judged}
    assert verdicts == {
        "m0:0": Verdict.CATASTROPHIC,
        "m0:1": Verdict.BELOW_EPSILON,
        "m0:2": Verdict.NO_EFFECT_RECORDED,
        "m0:3": Verdict.KEPT,
        "m0:4": Verdict.BELOW_CONFIRMED_RATE,
        "m0:5": Verdict.BEYOND_MAX_NEURONS,
    }


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (CatastrophicPolicy.KEEP, ["m0:0", "m0:1", "m0:2"]),
        (CatastrophicPolicy.DROP_CONFIRMED, ["m0:1", "m0:2"]),
        (CatastrophicPolicy.DROP_ALL, []),
    ],
)
def test_catastrophic_policies_drop_what_they_say(tmp_path, policy, kept):
    # When every agonist is also catastrophic none may come back in by a fall-back.
    _write(
        tmp_path,
        {f"m0:{i}": {"max_effect": 0.5} for i in range(3)},
        {"confirmed": {"m0:0": {}}, "candidates": {"m0:1": {}}, "not_always": {"m0:2": {}}},
    )
    assert _names(select_candidates(read_candidates(tmp_path), CandidateFilter(catastrophic=policy))) == kept


def test_regimes_are_united_and_the_stronger_one_speaks(tmp_path):
    _write(tmp_path / "positive_baseline", {"m1:1": {"max_effect": 0.3, "baseline_subset": "positive"}})
    _write(
        tmp_path / "negative_baseline",
        {"m1:1": {"max_effect": 0.7, "baseline_subset": "negative"}},
        {"confirmed": {"m1:1": {}}},
    )
    (candidate,) = read_candidates(tmp_path)
    assert candidate.regimes == ("negative", "positive")
    assert candidate.max_effect == 0.7
    assert candidate.catastrophic == "confirmed"
    assert math.isnan(candidate.confirmed_rate)


def test_a_zip_gives_the_same_candidates_as_its_folder(tmp_path):
    _write(tmp_path / "bag" / "positive_baseline", {"m1:1": {"max_effect": 0.3}, "a2.h0:3": {"max_effect": 0.4}})
    with zipfile.ZipFile(tmp_path / "bag.zip", "w") as archive:
        archive.write(tmp_path / "bag" / "positive_baseline" / "neuron_buckets.json", "bag/x/neuron_buckets.json")
        archive.writestr("__MACOSX/bag/neuron_buckets.json", b"\x00not json")
    assert read_candidates(tmp_path / "bag.zip") == read_candidates(tmp_path / "bag")


@pytest.mark.parametrize(
    "make",
    [
        lambda root: root / "nowhere",
        lambda root: root,
        lambda root: (root / "broken.zip").write_bytes(b"no zip") and root / "broken.zip",
    ],
)
def test_places_without_candidates_are_user_errors(tmp_path, make):
    with pytest.raises(UserError):
        read_candidates(make(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '{"non_catastrophic_agonists": []}'])
def test_damaged_buckets_are_user_errors(tmp_path, content):
    (tmp_path / "neuron_buckets.json").write_text(content)
    with pytest.raises(UserError):
        read_candidates(tmp_path)


def test_discovery_rows_prefer_original_numbers_and_map_old_positions(tmp_path):
    frame = world_frame(60)
    paths = write_world(tmp_path, frame, {"m1:1": 0.5}, discovery=[7, 3])
    scores = load_scores(paths["features"], TASK_SPEC)
    positives = scores.subset_rows("positive")
    old = paths["agonists"] / "positive_baseline" / "rule_0001.json"
    old.write_text(json.dumps({"sampled_associated_indices": [0, 2], "associated_indices": [5]}))
    new = paths["agonists"] / "positive_baseline" / "rule_0002.json"
    new.write_text(json.dumps({"sampled_unrelated_original_idx": [], "confirmation_unrelated_original_idx": [13]}))
    plan = tmp_path / "plan_baseline_negative.json"
    plan.write_text(json.dumps({"rules": [{"associated_indices": [1], "associated_original_idx": [11]}]}))
    found = discovery_rows([paths["agonists"], plan], scores)
    # 7, 3 and 13 as named; positions 0 and 2 of the positive TRAIN rows; 11 from the plan, not its position 1.
    assert found.tolist() == sorted({7, 3, 11, 13, int(positives[0]), int(positives[2])})


def test_discovery_rows_of_another_table_are_refused(tmp_path):
    frame = world_frame(20)
    paths = write_world(tmp_path, frame, {"m1:1": 0.5}, discovery=[20])
    with pytest.raises(UserError, match="another table"):
        discovery_rows([paths["agonists"]], load_scores(paths["features"], TASK_SPEC))
    assert discovery_rows([], load_scores(paths["features"], TASK_SPEC)).dtype == np.dtype(int)
