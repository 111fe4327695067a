"""Flip matrices: measured once, stored at once, derived from stored answers."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.ablation_engine import AblationEngine
from lib.cli import UserError, rng
from lib.flip_answer_log import AnswerLog, ChangedAnswers, decode_run, encode_run, group_key
from lib.interventions import DecodeScope, Intervention, build_table
from lib.neuron_intervention import UNKNOWN, AnswerLabels, label_flips, measure_answers, random_neurons
from lib.neurons import Neuron
from tests.flip_world import TASK_SPEC, PlantedEngine, world_frame
from tests.models import tiny_model
from tests.naive_ablation import naive_answer

N = [Neuron("m1", 3), Neuron("m2", 5), Neuron("a2.h1", 7)]
PLANTED = {"m1:3": lambda f: f.operand_a > 60, "m2:5": lambda f: f.operand_b > 200}


def _log(tmp_path, engine, name="log.jsonl"):
    log = AnswerLog(tmp_path / name, "key", len(engine.baseline_answers))
    if log.baseline is None:
        log.start(engine.baseline_answers, 16)
    return log


@settings(max_examples=50)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_packed_runs_round_trip(case):
    n_rows, rows = case
    run = ChangedAnswers(np.array(sorted(rows), dtype=int), tuple(f"answer {row}\n\u00e9" for row in sorted(rows)))
    key, back = decode_run(json.loads(json.dumps(encode_run("m1:3", run, n_rows))), n_rows)
    assert key == "m1:3"
    assert back.rows.tolist() == run.rows.tolist()
    assert back.answers == run.answers


def test_a_line_whose_bits_and_answers_disagree_is_refused():
    record = encode_run("m1:3", ChangedAnswers(np.array([0, 5]), ("a", "b")), 9)
    with pytest.raises(ValueError, match="disagree"):
        decode_run({**record, "answers": ["a"]}, 9)
    with pytest.raises(ValueError, match="disagree"):
        decode_run(record, 99)


def test_a_torn_last_line_is_measured_again_and_nothing_else(tmp_path):
    frame = world_frame(50)
    engine = PlantedEngine(frame, frame["prompt"].tolist(), PLANTED)
    groups = [(neuron,) for neuron in N]
    log = _log(tmp_path, engine)
    assert measure_answers(engine, groups, log, chunk=1) == 3
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-7])  # killed while the last line was written
    again = PlantedEngine(frame, frame["prompt"].tolist(), PLANTED)
    resumed = _log(tmp_path, again)
    assert measure_answers(again, groups, resumed, chunk=1) == 1
    assert [group_key(group) for call in again.calls for group in call] == ["m1:3"]  # last layers go first
    assert log.path.read_bytes() == whole
    assert measure_answers(again, groups, _log(tmp_path, again)) == 0


def test_an_altered_answer_is_not_believed(tmp_path):
    frame = world_frame(50)
    engine = PlantedEngine(frame, frame["prompt"].tolist(), PLANTED)
    log = _log(tmp_path, engine)
    measure_answers(engine, [(neuron,) for neuron in N], log, chunk=1)
    whole = log.path.read_bytes()
    first = whole.index(b"wrong", whole.index(b"\n"))
    # One bit: still JSON, still as many answers.
    log.path.write_bytes(whole[:first] + b"vrong" + whole[first + 5 :])
    with pytest.raises(UserError, match="damaged"):
        AnswerLog.read(log.path)
    n_lost = whole[first:].count(b"\n")
    assert measure_answers(engine, [(neuron,) for neuron in N], _log(tmp_path, engine), chunk=1) == n_lost > 0
    assert log.path.read_bytes() == whole


def test_the_engine_hears_of_all_groups_before_the_first_and_says_how_far_it_is(tmp_path):
    # Replacement values cost a pass over the reference prompts for each announcement, not for each group.
    frame = world_frame(50)
    engine = PlantedEngine(frame, frame["prompt"].tolist(), PLANTED)
    told = []
    measure_answers(engine, [(neuron,) for neuron in N], _log(tmp_path, engine), chunk=2, progress=told.append)
    assert [sorted(group_key(group) for group in call) for call in engine.prepared] == [["a2.h1:7", "m1:3", "m2:5"]]
    assert told == [50, 2 * 50]


def test_a_prepared_engine_measures_no_replacement_again(tmp_path, monkeypatch):
    lm = tiny_model("llama")
    prompts = ["one two", "three four five", "six"]
    table = build_table(lm, Intervention.MEAN, prompts, max_new_tokens=2)
    engine = AblationEngine(lm, prompts, table, max_new_tokens=2)
    engine.prepare([(Neuron("m0", 1),), (Neuron("m1", 2), Neuron("a1.h0", 3))])
    monkeypatch.setattr("lib.interventions._compute_tables", lambda *args: pytest.fail("measured again"))
    engine.answers([(Neuron("m1", 5),)], range(3))
    engine.answers([(Neuron("a1.h0", 0),), (Neuron("m0", 7),)], range(3))


def test_a_log_of_other_settings_is_refused(tmp_path):
    frame = world_frame(5)
    _log(tmp_path, PlantedEngine(frame, frame["prompt"].tolist(), {}))
    with pytest.raises(UserError, match="delete it"):
        AnswerLog(tmp_path / "log.jsonl", "other", 5)


def test_flips_follow_the_labels_not_the_texts(tmp_path):
    frame = world_frame(6)
    frame["raw_output"] = ["right", "right", "right", "wrong", "wrong", "unclear"]
    engine = PlantedEngine(frame, frame["prompt"].tolist(), {})
    log = _log(tmp_path, engine)
    # Row 0 keeps its label under another text, 1 is lost, 2 cannot be told, 3 is gained, 5 never had a label.
    log.append([(N[0],)], [ChangedAnswers(np.array([0, 1, 2, 3, 5]), ("right", "bad", "unclear", "right", "right"))])
    matrix = label_flips([(N[0],)], log, AnswerLabels(TASK_SPEC, frame.to_dict("records")))
    assert matrix.baseline.tolist() == [True, True, True, False, False, False]
    assert matrix.ablated[0].tolist() == [1, 0, UNKNOWN, 1, 0, UNKNOWN]
    assert matrix.flips[0].tolist() == [False, True, False, True, False, False]
    assert matrix.known[0].tolist() == [True, True, False, True, True, False]
    assert matrix.changed[0].tolist() == [True, True, True, True, False, True]


def test_each_answer_is_scored_once(tmp_path):
    asked = []

    class Counting:
        def score_answers(self, rows, answers):
            asked.extend(zip([row["prompt"] for row in rows], answers, strict=True))
            return TASK_SPEC.score_answers(rows, answers)

    labels = AnswerLabels(Counting(), world_frame(3).to_dict("records"))
    assert labels([0, 1, 0], ["right", "wrong", "right"]).tolist() == [1, 0, 1]
    assert labels([0, 2], ["right", "right"]).tolist() == [1, 1]
    assert len(asked) == 3


def test_extracted_logs_hold_the_chosen_rows_and_groups(tmp_path):
    frame = world_frame(20)
    engine = PlantedEngine(frame, frame["prompt"].tolist(), PLANTED)
    log = _log(tmp_path, engine)
    measure_answers(engine, [(neuron,) for neuron in N], log)
    rows = np.arange(1, 20, 2)
    part = AnswerLog.read(log.extract(tmp_path / "part.jsonl", [(N[0],)], rows).path)
    assert list(part.runs) == ["m1:3"]
    assert part.baseline == [engine.baseline_answers[row] for row in rows]
    assert part.runs["m1:3"].rows.tolist() == np.flatnonzero(frame["operand_a"].to_numpy()[rows] > 60).tolist()


def test_random_neurons_are_new_and_of_the_same_components():
    drawn = random_neurons([N[0], N[0], N[2]], 8, N, rng(0, "r"))
    assert [neuron.layer_label for neuron in drawn] == ["m1", "m1", "a2.h1"]
    assert len({*drawn, *N}) == 6
    # Seven other coordinates exist in m1: no more can be drawn.
    assert len(random_neurons([N[0]] * 20, 8, N, rng(0, "r"))) == 7


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_no_op_changes_nothing_and_single_neurons_equal_naive_hooks(tmp_path, family):
    lm = tiny_model(family)
    prompts = [f"{a}+{b}=" for a in range(3) for b in range(10, 14)]
    table = build_table(lm, Intervention.MEAN_POSITIONAL, prompts[:6], max_new_tokens=3)
    engine = AblationEngine(lm, prompts, table, max_new_tokens=3)
    groups = [(), (Neuron("m0", 1),), (Neuron("m2", 4),), (Neuron("a1.h2", 3),)]
    log = _log(tmp_path, engine)
    measure_answers(engine, groups, log)
    assert log.runs[""].rows.size == 0
    for group in groups[1:]:
        expected = [
            naive_answer(lm, prompt, number, group, table, max_new_tokens=3, decode_only=True, scope=DecodeScope.ANSWER)
            for number, prompt in enumerate(prompts)
        ]
        run = log.runs[group_key(group)]
        answers = list(log.baseline)
        for row, answer in zip(run.rows, run.answers, strict=True):
            answers[row] = answer
        assert answers == expected
