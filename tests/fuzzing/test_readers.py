"""Random and mutated input to every reader of strangers' text: a value or a `UserError`, never another exception."""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib.artifacts import read_json, read_pickle, write_json
from lib.cli import UserError
from lib.feature_proposals import parse_reply, read_proposal
from lib.feature_sandbox import function_name, read_values, safe_message
from lib.flip_candidates import discovery_rows, read_candidates
from lib.plain_pickle import load_plain
from lib.stages.agonist_inputs import Circuit, read_circuits, read_dataset_info, read_plan
from lib.stages.agonist_slices import _planned_rows
from lib.stages.behaviour import recorded_task
from lib.task_spec import resolve_task_spec
from lib.text_and_rules import Rule, parse_rule, read_rule_file

N_EXAMPLES = 100
fuzzed = settings(max_examples=N_EXAMPLES, derandomize=True)

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
                    st.sampled_from(["", "ok", "m0", "is_correct", "../x", "all", "inf", 10**400, -1]))  # fmt: skip
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def paths_in(value: Any, at: tuple = ()) -> list[tuple]:
    """Where something stands in a JSON value: every place but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in ((*at, key), *paths_in(item, (*at, key)))]


@st.composite
def mutated(draw, whole: Any) -> Any:
    """A whole content with up to three of its parts removed or replaced by anything."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        places = paths_in(value)
        if not places:
            break
        *above, last = draw(st.sampled_from(places))
        holder = value
        for key in above:
            holder = holder[key]
        if draw(st.booleans()) or isinstance(holder, list):
            holder[last] = draw(JSON)
        else:
            del holder[last]
    return value


def value_or_user_error(action, *arguments) -> Any:
    """What the action gives; None for a `UserError`, whose text is never empty."""
    try:
        return action(*arguments)
    except UserError as error:
        assert str(error)
        return None


# ---------------------------------------------------------------- rules

RULE_PIECES = st.sampled_from(["a", "b.c", "`odd name`", "1", "-2.5e3", "1e999", "<=", ">", "<", ">=", "==", "!=", "&",
                               "|", "~", "AND", "or", "NOT", "(", ")", "=", "`", "x" * 300, "nan", "inf",
                               "__import__('os')", "@x",
                               "\n", "\x00", "é", "FALSE", "True", "&&", "||", ","])  # fmt: skip


@fuzzed
@given(st.lists(RULE_PIECES, max_size=25).map(" ".join) | st.text(max_size=60))
@example("(" * 10_000)
@example("~" * 10_000 + "a > 1")
@example(" & ".join(["(a > 1 | b > 1)"] * 40))
@example("a > 1 " * 5_000)
def test_rule_text(text):
    rule = value_or_user_error(parse_rule, text)
    if rule is not None:
        assert isinstance(rule, Rule)
        assert parse_rule(rule.text()) == rule
        columns = {name: np.array([0.0, 1.0, np.nan]) for name in rule.features} or {"x": np.zeros(3)}
        assert rule.covers(columns).shape == (3,)


@fuzzed
@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode)
       | mutated([{"rule": "a > 1", "rule_id": 0, "coefficient_sign": "positive", "component_type": "rule"}]).map(
           lambda value: json.dumps(value).encode()), st.sampled_from(["r.csv", "r.json"]))  # fmt: skip
def test_rule_files(place, content, name):
    (place / name).write_bytes(content)
    rules = value_or_user_error(read_rule_file, place / name)
    assert rules is None or all(isinstance(rule.rule, Rule) for rule in rules)


# ---------------------------------------------------------------- features and replies


@fuzzed
@given(st.text(max_size=200) | mutated({"features": [{
    "label": "l", "description": "d", "python_src": "def f(prompt, info):\n return 1"}]}).map(json.dumps))  # fmt: skip
@example("[" * 5_000)
@example('{"features": [' * 500)
@example("<think>" * 500)
def test_chat_replies(text):
    for item in parse_reply(text):
        proposal = read_proposal(item)
        assert proposal.label or proposal.reason


HEADERS = ["def f(prompt, info):", "def f(prompt: str, info: dict) -> float:", "def f(", "prompt", "info", ",", ":",
           "[", "]", "(", ")", "\n", " " * 50, "def ", "lambda", "\\", '"""', "prompt" * 100]  # fmt: skip


@fuzzed
@given(st.lists(st.sampled_from(HEADERS), max_size=40).map("".join) | st.text(max_size=300))
@example("def f(prompt:" + "[" * 4_000)
@example("def f(prompt" + " \t\n" * 2_600)
@example("def f(prompt" + ":a[b]" * 1_500)
def test_feature_sources(source):
    name = function_name(source)
    assert name is None or name.isidentifier()


@fuzzed
@given(st.lists(SCALARS | st.lists(SCALARS, max_size=2) | st.binary(max_size=3), max_size=6))
def test_values_from_a_sandbox(raw):
    from lib.feature_sandbox import SandboxError

    try:
        values, failures = read_values(raw)
    except SandboxError:
        return
    assert len(values) == len(raw) and not np.isinf(values).any()
    assert all(safe_message(text) == text for _, text in failures)


# ---------------------------------------------------------------- plans, manifests, records

PLAN = {"baseline_subset": "all", "dataset_size": 4, "rules": [
    {"rule_target": "is_correct", "rule_id": 0, "status": "ok", "associated_indices": [0, 1],
     "unrelated_indices": [2]}]}  # fmt: skip
MANIFEST = [{
    "circuit_id": 0, "circuit_label": "a > 1", "target": "is_correct", "coefficient_sign": "positive", "status": "ok",
    "sampling_strategy": "plan", "cluster_index": None, "metadata_topn": {
        "d_model": 4, "neurons": {"m0": [1, 2], "a1.h0": [3]}, "neuron_label_score": {"('m0', 1)": 0.5}}}]  # fmt: skip
NODES = [{**MANIFEST[0], "metadata_topn": {"d_model": 4, "node_label_score": {"m0": 1.0},
                                           "edge_label_score": {"m0->a1.h0<q>": 0.5}}}]  # fmt: skip
BUCKETS = {"catastrophic_zero": {"confirmed": {"m0:1": {}}}, "non_catastrophic_agonists": {
    "m0:1": {"best_abs_gap": 0.5, "last_record": {"baseline_subset": "positive", "max_effect": 0.5}}}}  # fmt: skip
FLAGS = Namespace(cluster_by_spectral=False, max_n_of_rules_to_analyze=None, mlp_neurons_only=False, last_k_layers=None,
                  top_k_neurons=None, scores_path=None, ai_model=None)  # fmt: skip
CIRCUIT = Circuit(0, "a > 1", "is_correct", None, None, None, (), np.zeros(0), np.zeros(0, bool), np.zeros(0))


class FourRows:
    """As much of a feature table as a plan is held against."""

    path = Path("scores.csv")

    def __len__(self) -> int:
        return 4

    def subset_rows(self, subset: str) -> np.ndarray:
        return np.arange(4)


@fuzzed
@given(mutated(PLAN) | JSON)
def test_plans(place, value):
    write_json_loosely(place / "plan.json", value)
    plan = value_or_user_error(read_plan, place / "plan.json")
    if plan is not None and (entry := plan.entry(CIRCUIT)) is not None:
        rows = value_or_user_error(_planned_rows, entry, "associated", plan, FourRows())
        assert rows is None or set(rows.tolist()) <= set(range(4))


@fuzzed
@given(mutated(MANIFEST) | mutated(NODES) | JSON, st.booleans())
def test_manifests(place, value, some_layers):
    write_json_loosely(place / "manifest.json", value)
    flags = Namespace(**{**vars(FLAGS), "last_k_layers": 1 if some_layers else None})
    circuits = value_or_user_error(read_circuits, place / "manifest.json", flags)
    for circuit in circuits or []:
        assert "/" not in circuit.target and len(circuit.scores) == len(circuit.neurons)


@fuzzed
@given(mutated({"scores_path": "a/scores.csv", "ai_model": "m"}) | JSON)
def test_dataset_infos(place, value):
    write_json_loosely(place / "dataset_info.json", value)
    value_or_user_error(read_dataset_info, place, FLAGS)


@fuzzed
@given(mutated(BUCKETS) | JSON)
def test_buckets(place, value):
    write_json_loosely(place / "bag" / "neuron_buckets.json", value)
    value_or_user_error(read_candidates, place / "bag")


@fuzzed
@given(mutated({"baseline_subset": "all", "sampled_associated_original_idx": [0, 3], "rules": [
    {"unrelated_indices": [1, 2], "baseline_subset": "positive"}]}) | JSON)  # fmt: skip
def test_discovery_rows(place, value):
    write_json_loosely(place / "rules" / "rule_0000.json", value)
    rows = value_or_user_error(discovery_rows, [place / "rules"], FourRows())
    assert rows is None or set(rows.tolist()) <= set(range(4))


@fuzzed
@given(mutated({"task_module": "lib.tasks.arithmetic_task", "task": "arithmetic",
                "settings": {"max_operand": 3, "operators": "+", "max_new_tokens": 3, "limit": 0}}) | JSON)
def test_recorded_settings(place, value):
    write_json_loosely(place / "task_settings.json", value)
    value_or_user_error(resolve_task_spec, "lib.tasks.arithmetic_task", place)
    settings_of = {"settings": {"task_module": "lib.tasks.arithmetic_task",
                                "task_settings": value.get("settings") if isinstance(value, dict) else value}}
    write_json_loosely(place / "answers.run_metadata.json", settings_of)
    value_or_user_error(recorded_task, "lib.tasks.arithmetic_task", place / "answers.pkl")


@fuzzed
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"[" * 100_000)
@example(b"1" * 10_000)
@example(b'{"a": NaN, "b": -Infinity, "c": 1e999}')
@example(b"\xef\xbb\xbf[]")
def test_json(place, content):
    (place / "a.json").write_bytes(content)
    value_or_user_error(read_json, place / "a.json", "file")


def write_json_loosely(path: Path, value: Any) -> None:
    """As Python's own writer does it, with bare NaN and Infinity."""
    if value == value:
        write_json(path, None)
    path.write_text(json.dumps(value))


# ---------------------------------------------------------------- pickles

PLAIN = {"+": [("1+2=", 3, "3", True, None, 0.5), ("é" * 300, 2**70, "", False, None, -1.0)]}
WHOLE = [pickle.dumps(PLAIN, protocol) for protocol in (2, 4, 5)]
INSTRUCTIONS = [bytes([code]) for code in range(256)]


@st.composite
def mutated_pickles(draw) -> bytes:
    """A whole pickle with bytes changed, put in, taken out or cut off; instructions are put in as often as data."""
    content = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["change", "insert", "remove", "cut", "repeat"]))
        if kind == "change":
            content[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "insert":
            content[place:place] = draw(st.sampled_from(INSTRUCTIONS) | st.binary(max_size=9))
        elif kind == "remove":
            del content[place : place + draw(st.integers(1, 9))]
        elif kind == "cut":
            del content[place + 1 :]
        else:
            content[place:place] = content[: draw(st.integers(0, 40))]
    return bytes(content)


@settings(fuzzed, max_examples=500)
@given(mutated_pickles() | st.binary(max_size=120) | st.lists(st.sampled_from(INSTRUCTIONS), max_size=30).map(b"".join))
@example(b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".")
@example(b"\x80\x04" + b"N\x85" * 1 + b"\x85" * 300_000 + b".")
@example(b"\x80\x04}\x94" + b"h\x00" * 2 + b"s.")
@example(b"\x80\x04]\x94h\x00a.")
def test_pickles(place, content):
    # The audit hook sees no import, opened file or started process while the bytes are loaded.
    with watched() as seen:
        try:
            load_plain(content)
        except pickle.UnpicklingError as error:
            assert str(error)
    assert seen == []
    (place / "a.pkl").write_bytes(content)
    value_or_user_error(read_pickle, place / "a.pkl", "answers")


@settings(fuzzed, max_examples=200)
@given(st.sampled_from(["arithmetic", "hans_nli", "table", "bon_jailbreaking"]), st.data())
def test_caches_of_answers_of_any_shape(name, data):
    whole = {
        "arithmetic": {"+": [["1+2=", 3, "3", True, None]]},
        "hans_nli": [{"prompt": "p", "output": "yes", "gold_label": "entailment", "is_correct": True}],
        "table": [{"prompt": "p", "expected_answer": "a", "columns": {"c": "1"}, "raw_output": "a",
                   "is_correct": True}],
        "bon_jailbreaking": [{"prompt": "p", "answer": "a", "is_jailbroken": True, "original_prompt": "p",
                              "augmentation_info": {"sigma": 0.1, "stats": {}}}],
    }[name]  # fmt: skip
    task = resolve_task_spec(f"lib.tasks.{name}_task")
    value = data.draw(mutated(whole) | JSON)
    from lib.stages.behaviour import dataset_of

    value_or_user_error(dataset_of, task, value, Path("answers.pkl"))


class watched:  # noqa: N801 (reads as a statement)
    """Collects audit events that loading data never causes. A hook cannot be removed, so there is one, switched off."""

    active: list[str] | None = None
    suspicious = ("import", "open", "os.", "subprocess", "exec", "compile", "ctypes", "socket", "pickle.find_class")
    installed = False

    def __enter__(self) -> list[str]:
        import sys

        if not watched.installed:
            sys.addaudithook(watched._hook)
            watched.installed = True
        watched.active = []
        return watched.active

    def __exit__(self, *error: object) -> None:
        watched.active = None

    @staticmethod
    def _hook(event: str, arguments: tuple) -> None:
        if watched.active is not None and event.startswith(watched.suspicious):
            watched.active.append(event)


def test_the_watch_sees_what_an_ordinary_reader_does():
    with watched() as seen, pytest.raises(Exception, match="no_such"):
        pickle.loads(b"cno_such_module\nx\n.")
    assert "pickle.find_class" in seen and "import" in seen
