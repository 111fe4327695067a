"""Proposals: reading replies of any shape, rounds within a budget, feedback, and a stage 2 run with a feature model."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.caching_and_prompting import ChatClient, ChatModel, RetryPolicy
from lib.chat_backends import Provider
from lib.cli import Report, UserError
from lib.feature_proposals import (
    ProposalOptions,
    Rejected,
    parse_reply,
    propose,
    read_proposal,
    user_message,
)
from lib.feature_representation import Feature
from lib.tasks.arithmetic_task import TASK_SPEC, ArithmeticSettings
from lib.wasm_sandbox import WasmSandbox
from tests.chat_servers import ScriptedServer, status, text
from tests.scripts import run_script

OPTIONS = ProposalOptions(n_features=2, n_rounds=2, n_positive=3, n_negative=3)


def item(label: str, body: str = "return len(prompt)", **changes) -> dict:
    return {"label": label, "description": f"about {label}",
            "python_src": f"def f(prompt: str, info: dict):\n    {body}\n", **changes}  # fmt: skip


def reply(*items: dict) -> str:
    return json.dumps({"features": list(items)})


# ---------------------------------------------------------------- replies

A, B = item("A"), item("B")


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        (reply(A, B), ["A", "B"]),
        (json.dumps([A, B]), ["A", "B"]),
        (json.dumps(A), ["A"]),
        (f"Sure! Here [as asked] they are:\n```json\n{json.dumps([A, B])}\n```\nEnjoy {{them}}.", ["A", "B"]),
        (f"<think>maybe [1, 2] or {{x}}</think>{reply(A)}", ["A"]),
        (f'[{{"label": "old"}}] no, better: {json.dumps([A, B])}', ["A", "B"]),
        (json.dumps({"result": {"x": 1}, "list": [A]}), ["A"]),
        ("I cannot help with that.", []),
        ("", []),
        ("[1, 2, 3]", []),
        ('{"features": "none"}', []),
        (reply(A)[:-20], []),
        (reply(A, B, item("C"))[:-20], ["A", "B"]),
    ],
)
def test_replies_of_any_shape(content, labels):
    assert [found.get("label") for found in parse_reply(content)] == labels


@given(st.text('[]{}":,ab \\\n', max_size=80))
def test_no_reply_breaks_the_reader(content):
    assert all(isinstance(found, dict) for found in parse_reply(content))


def test_deep_nesting_is_no_trap():
    assert parse_reply("[" * 100_000) == []


def test_proposals_become_features_or_reasons():
    feature = read_proposal(item("  A  label ", python_src="```python\ndef g(prompt, info):\n    return 1\n```"))
    assert (feature.label, feature.fn_name, feature.python_src) == (
        "A label",
        "g",
        "def g(prompt, info):\n    return 1\n",
    )
    assert read_proposal(item("", description="what it is")).label == "what it is"
    for wrong, reason in ((item("", description=""), "neither"), (item("A", python_src="lambda p: 1"), "no function"),
                          (item("A", python_src=5), "no function"), (item("A", python_src="x" * 9000), "too long"),
                          ({}, "neither")):  # fmt: skip
        assert reason in read_proposal(wrong).reason


def test_the_question_keeps_prompts_apart_from_instructions():
    known = [Feature("Known", "already there")]
    rejected = [Rejected("Bad", "", "", "it loops")]
    message = user_message(TASK_SPEC, ["1+1=", 'x"\n- ignore'], ["2+2="], known, rejected, 7)
    assert "Propose 7 features" in message
    assert '- "x\\"\\n- ignore"' in message
    assert "correctly answered" in message and "Known: already there" in message and "Bad: it loops" in message
    assert TASK_SPEC.TOKENS_DICT_KEYS in message


# ---------------------------------------------------------------- rounds


def run_rounds(folder, *replies, try_out=lambda feature: None, **options):
    with ScriptedServer(*replies) as server:
        model = ChatModel(Provider.OPENAI, "m", server.url + "/v1")
        with ChatClient(model, folder, RetryPolicy(attempts=1), sleep=lambda _: None) as client:
            found = propose(client, TASK_SPEC, ["1+1="] * 5, ["2+2="] * 5, [Feature("Seed", "")], try_out,
                            ProposalOptions(**{**vars(OPTIONS), **options}), 0, Report(quiet=True))  # fmt: skip
    return found, [request["messages"][-1]["content"] for request in server.requests], server


def test_rounds_collect_features_and_send_the_tasks_guidance(tmp_path):
    found, messages, server = run_rounds(tmp_path, text(reply(A)), text(reply(B)))
    assert [feature.label for feature in found.features] == ["A", "B"]
    assert (found.n_rounds, found.n_attempts, found.rejected) == (2, 2, [])
    assert server.requests[0]["messages"][0] == {"role": "system", "content": TASK_SPEC.SYSTEM_PROMPT}
    assert "A: about A" in messages[1]


def test_useless_replies_cost_attempts_and_end(tmp_path):
    found, messages, _ = run_rounds(tmp_path, text("I cannot help with that."))
    assert found.features == []
    assert found.n_attempts == OPTIONS.max_attempts == len(messages)
    assert "not the JSON asked for" in messages[1]
    assert "0 of 2 rounds" in found.notes[-1]


def test_what_was_found_survives_a_model_that_gives_up(tmp_path):
    found, _, _ = run_rounds(tmp_path, text(reply(A)), status(500))
    assert [feature.label for feature in found.features] == ["A"]
    assert any("no reply" in note for note in found.notes)


def test_a_model_that_never_answers_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match="--no_llm"):
        run_rounds(tmp_path, status(500))


def test_rejections_are_kept_and_told(tmp_path):
    bad, twin, seed = item("Bad", "return 'x'"), item("a"), item("SEED")
    found, messages, _ = run_rounds(
        tmp_path,
        text(reply(A, bad, twin, seed)),
        text(reply(B)),
        try_out=lambda feature: "gives text" if "'x'" in feature.python_src else None,
    )
    assert [feature.label for feature in found.features] == ["A", "B"]
    reasons = {rejected.label: rejected.reason for rejected in found.rejected}
    assert reasons == {
        "Bad": "gives text",
        "a": "a feature with this label exists",
        "SEED": "a feature with this label exists",
    }
    assert "Bad: gives text" in messages[1]


def test_the_same_seed_asks_the_same_so_a_second_run_costs_no_call(tmp_path):
    first, _, server = run_rounds(tmp_path, text(reply(A)), text(reply(B)))
    # Another server on another port would be another key: use the same address again.
    model = ChatModel(Provider.OPENAI, "m", server.url + "/v1")
    with ChatClient(model, tmp_path, RetryPolicy(attempts=1), sleep=lambda _: None) as client:
        again = propose(client, TASK_SPEC, ["1+1="] * 5, ["2+2="] * 5, [Feature("Seed", "")], lambda feature: None,
                        OPTIONS, 0, Report(quiet=True))  # fmt: skip
    assert again.features == first.features


# ---------------------------------------------------------------- stage 2 with a feature model


@pytest.fixture
def answers(tmp_path):
    task = TASK_SPEC.configured(ArithmeticSettings(max_operand=9, operators="+"))
    examples = task.examples(0)
    cache = task.cache_from_answers(examples, ["18" if "9+9" in example["prompt"] else "3" for example in examples])
    path = tmp_path / "llm_io_data.pkl"
    path.write_bytes(pickle.dumps(cache))
    return path


def stage_2(answers, folder, url, *extra):
    return run_script("2_generate_features", [
        "-i", answers, "-o", folder, "-c", answers.parent / "calls", "-m", "openai:m", "--base_url", url, "-R", "2",
        "--quiet", *extra])  # fmt: skip


def test_proposed_features_reach_the_table_with_their_backend(answers, tmp_path):
    pytest.importorskip("pydantic_monty")
    small = item("Sum is small", "return 1.0 if info['operand_a'] + info['operand_b'] < 4 else 0.0")
    poison = item("Prompt", "return info['operand_a']")
    loop = item("Loop", "while True:\n        pass")
    dialect = item("Largest digit", "return float(max(prompt[:-1].replace('+', ''), key=str.lower))")
    with ScriptedServer(text(reply(small, loop, dialect)), text(reply(poison))) as server:
        assert stage_2(answers, tmp_path / "report", server.url + "/v1") == 0
        shown = json.dumps(server.requests)
    catalogue = {entry["label"]: entry for entry in json.loads((tmp_path / "report/features.json").read_text())}
    assert (catalogue["Sum is small"]["column"], catalogue["Sum is small"]["backend"]) == ("sum_is_small", "monty")
    assert catalogue["Sum is small"]["origin"] == "llm"
    if WasmSandbox.is_installed():
        assert catalogue["Largest digit"]["backend"] == "wasm"
    assert catalogue["Prompt"]["column"] == "feature_prompt"
    rejected = json.loads((tmp_path / "report/rejected_features.json").read_text())
    assert [entry["reason"] for entry in rejected if entry["label"] == "Loop"][0].startswith("TimeoutError")
    import pandas as pd

    frame = pd.read_csv(tmp_path / "report/scores.csv")
    expected = [sum(map(int, prompt.rstrip("=").split("+"))) < 4 for prompt in frame["prompt"]]
    assert frame["sum_is_small"].astype(bool).tolist() == expected
    # The feature model has seen no held-out prompt.
    for prompt in frame.loc[frame["is_test"], "prompt"]:
        assert f'\\"{prompt}\\"' not in shown
    report = (tmp_path / "report/features.md").read_text()
    assert "`sum_is_small`" in report and "Loop" in report
    assert (tmp_path / "report/figures/feature_distributions_01.pdf").is_file()


@pytest.mark.parametrize("model", ["openai:m", "ollama:m"])
def test_useless_replies_leave_the_seeds(answers, tmp_path, capsys, monkeypatch, model):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    refusal, prose, cut = "No.", "Here are some ideas: longer prompts are harder.", reply(A)[:-20]
    empty = [text(" ")] * 5  # one question, with all its attempts
    with ScriptedServer(text(refusal), text(prose), text(cut), *empty, text(refusal)) as server:
        url = server.url + ("/v1" if model == "openai:m" else "")
        assert stage_2(answers, tmp_path / "report", url, "-m", model) == 0
    # Six questions for two rounds, each asked once but for the empty reply.
    assert len(server.requests) == 3 + 5 + 2
    told = capsys.readouterr().out
    assert "0 of 2 rounds" in told
    assert "no reply (empty reply" in told
    assert len(json.loads((tmp_path / "report/features.json").read_text())) > 5


def test_a_server_that_is_down_is_one_line(answers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert stage_2(answers, tmp_path / "report", "http://127.0.0.1:9/v1") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--no_llm" in error
