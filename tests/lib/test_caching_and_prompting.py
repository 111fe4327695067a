"""Chat client: provider names, faults and retries, the cache, keys kept secret, and two real servers on loopback."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from lib import chat_backends
from lib.caching_and_prompting import ChatClient, ChatModel, ChatOptions, ChatRequest, RetryPolicy, resolve_chat_model
from lib.chat_backends import Provider
from lib.cli import UserError
from tests.chat_servers import ScriptedServer, dripping, raw, slow, status, text, truncated
from tests.scripts import REPOSITORY

OPTIONS = ChatOptions(temperature=0.3, max_tokens=20)
PROTOCOLS = {Provider.OPENAI: "/v1", Provider.GROQ: "", Provider.OLLAMA: ""}


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "GROQ_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(chat_backends, "_credentials", dict)


@pytest.fixture(params=list(PROTOCOLS), ids=lambda provider: provider.value)
def provider(request):
    return request.param


def client(provider, server, folder, waits=None, **policy) -> ChatClient:
    model = ChatModel(provider, "m", server.url + PROTOCOLS[provider])
    return ChatClient(
        model, folder, RetryPolicy(timeout=5.0, **policy), sleep=[].append if waits is None else waits.append
    )


def ask(provider, server, folder, prompts=("hello",), **policy):
    with client(provider, server, folder, **policy) as chat:
        return chat.ask([ChatRequest(prompt) for prompt in prompts], OPTIONS)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "provider", "model"),
    [
        ("gemma3:27b", Provider.OLLAMA, "gemma3:27b"),
        ("gpt-oss:20b", Provider.OLLAMA, "gpt-oss:20b"),
        ("olmo2:7b", Provider.OLLAMA, "olmo2:7b"),
        ("orca-mini", Provider.OLLAMA, "orca-mini"),
        ("gpt-4o", Provider.OPENAI, "gpt-4o"),
        ("o3-mini", Provider.OPENAI, "o3-mini"),
        ("groq:qwen/qwen3-32b", Provider.GROQ, "qwen/qwen3-32b"),
        ("ollama:gpt-4o", Provider.OLLAMA, "gpt-4o"),
        ("openai:my:model", Provider.OPENAI, "my:model"),
        ("local:SmolLM2-135M-Instruct", Provider.LOCAL, "SmolLM2-135M-Instruct"),
    ],
)
def test_names(name, provider, model):
    assert resolve_chat_model(name) == ChatModel(provider, model)


def test_a_base_url_means_openais_protocol_unless_a_provider_is_named():
    assert resolve_chat_model("qwen", "http://x/v1") == ChatModel(Provider.OPENAI, "qwen", "http://x/v1")
    assert resolve_chat_model("ollama:qwen", "http://x") == ChatModel(Provider.OLLAMA, "qwen", "http://x")


@pytest.mark.parametrize("name", ["", "openai:"])
def test_incomplete_names(name):
    with pytest.raises(UserError):
        resolve_chat_model(name)


# ---------------------------------------------------------------- answers and faults, in each protocol


def test_the_question_arrives_and_the_answer_comes_back(provider, tmp_path):
    with ScriptedServer(text(" Hi. ")) as server, client(provider, server, tmp_path) as chat:
        assert chat.ask([ChatRequest("hello", system="be brief")], OPTIONS)[0].text == "Hi."
    request = server.requests[0]
    assert request["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    settings = request.get("options", request)
    assert settings["temperature"] == 0.3
    assert settings.get("max_tokens", settings.get("num_predict")) == 20


FAULTS = {
    "429": status(429),
    "500": status(500),
    "503": status(503),
    "truncated": truncated,
    "prose": raw(b"Sorry, I am busy."),
    "wrong json": raw(b'{"hello": 1}'),
    "empty body": raw(b""),
    "empty answer": text("  "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_retried(provider, fault, tmp_path):
    with ScriptedServer(FAULTS[fault], text("fine")) as server:
        assert ask(provider, server, tmp_path)[0].text == "fine"
    assert len(server.requests) == 2


@pytest.mark.parametrize("fault", [slow(30.0), dripping(30.0)], ids=["silent", "dripping"])
def test_slow_bytes_end_at_the_timeout(provider, fault, tmp_path):
    with ScriptedServer(fault, text("fine")) as server:
        model = ChatModel(provider, "m", server.url + PROTOCOLS[provider])
        started = time.monotonic()
        with ChatClient(model, tmp_path, RetryPolicy(timeout=0.5), sleep=[].append) as chat:
            assert chat.ask([ChatRequest("hello")], OPTIONS)[0].text == "fine"
        assert time.monotonic() - started < 15


def test_attempts_end_with_the_last_error(provider, tmp_path):
    with ScriptedServer(status(500, "kaput")) as server:
        reply = ask(provider, server, tmp_path, attempts=3)[0]
    assert reply.text is None
    assert "kaput" in reply.error and "3 attempts" in reply.error
    assert len(server.requests) == 3


def test_a_refused_connection_is_an_error_not_a_crash(provider, tmp_path):
    model = ChatModel(provider, "m", "http://127.0.0.1:9")
    with ChatClient(model, tmp_path, RetryPolicy(attempts=2), sleep=[].append) as chat:
        assert chat.ask([ChatRequest("hello")], OPTIONS)[0].text is None


def test_a_refused_request_stops_at_once(provider, tmp_path):
    with ScriptedServer(status(404, "no such model")) as server, pytest.raises(UserError, match="no such model"):
        ask(provider, server, tmp_path)
    assert len(server.requests) == 1


def test_waits_double_and_the_server_may_ask_for_its_own(tmp_path):
    waits: list[float] = []
    replies = [status(500), status(429, "slowly", Retry_After="7"), status(500), status(500), text("fine")]
    with ScriptedServer(*replies) as server, client(Provider.OPENAI, server, tmp_path, waits) as chat:
        assert chat.ask([ChatRequest("hello")], OPTIONS)[0].text == "fine"
    assert waits == [1.0, 7.0, 4.0, 8.0]


def test_the_budget_bounds_all_questions_together(tmp_path):
    with ScriptedServer(status(500)) as server:
        replies = ask(Provider.OPENAI, server, tmp_path, [f"q{i}" for i in range(10)], budget=7, parallel=1)
    assert len(server.requests) == 7
    assert all(reply.text is None for reply in replies)


def test_parallelism_is_bounded_and_answers_keep_their_order(tmp_path):
    def echo(handler, request):
        time.sleep(0.05)
        text(request["messages"][0]["content"])(handler, request)

    prompts = [f"q{i}" for i in range(12)]
    with ScriptedServer(echo) as server:
        replies = ask(Provider.OPENAI, server, tmp_path, prompts, parallel=3)
    assert [reply.text for reply in replies] == prompts
    assert 1 < server.most_running <= 3


def test_a_schema_is_asked_for_and_given_up_where_it_is_not_known(tmp_path):
    schema = {"type": "array"}
    with ScriptedServer(status(400, "response_format is not supported"), text("[]")) as server:
        with client(Provider.OPENAI, server, tmp_path) as chat:
            assert chat.ask([ChatRequest("hello")], ChatOptions(schema=schema))[0].text == "[]"
    assert server.requests[0]["response_format"]["json_schema"]["schema"] == schema
    assert "response_format" not in server.requests[1]
    with ScriptedServer(text("[]")) as server, client(Provider.OLLAMA, server, tmp_path / "o") as chat:
        chat.ask([ChatRequest("hello")], ChatOptions(schema=schema))
    assert server.requests[0]["format"] == schema


def test_a_long_question_gets_a_large_enough_context(tmp_path):
    with ScriptedServer(text("ok")) as server:
        ask(Provider.OLLAMA, server, tmp_path, ["word " * 10_000])
    assert server.requests[0]["options"]["num_ctx"] > 20_000


# ---------------------------------------------------------------- the cache


def test_what_was_answered_is_never_asked_again(provider, tmp_path):
    with ScriptedServer(text("one")) as server:
        assert [ask(provider, server, tmp_path)[0].text for _ in range(3)] == ["one"] * 3
        assert len(server.requests) == 1
        assert [reply.text for reply in ask(provider, server, tmp_path, ["hello", "other", "other"])] == ["one"] * 3
        assert len(server.requests) == 2


def test_everything_that_matters_is_in_the_key(tmp_path):
    request = ChatRequest("hello")
    keys = set()
    for model in (ChatModel(Provider.OPENAI, "m"), ChatModel(Provider.OPENAI, "n"), ChatModel(Provider.GROQ, "m"),
                  ChatModel(Provider.OPENAI, "m", "http://x")):  # fmt: skip
        with ChatClient(model, tmp_path) as chat:
            keys.add(chat.key(request, OPTIONS))
    with ChatClient(ChatModel(Provider.OPENAI, "m"), tmp_path) as chat:
        for other in (ChatRequest("x"), ChatRequest("hello", system="s"), ChatRequest("hello", sample=1)):
            keys.add(chat.key(other, OPTIONS))
        for options in (
            ChatOptions(0.4, 20),
            ChatOptions(0.3, 21),
            ChatOptions(0.3, 20, 1),
            ChatOptions(0.3, 20, 42, {}),
        ):
            keys.add(chat.key(request, options))
    assert len(keys) == 11


def test_failures_are_not_kept(tmp_path):
    with ScriptedServer(status(500), status(500), text("fine")) as server:
        assert ask(Provider.OPENAI, server, tmp_path, attempts=2)[0].text is None
        assert ask(Provider.OPENAI, server, tmp_path, attempts=2)[0].text == "fine"


def test_a_killed_run_repeats_no_finished_call(tmp_path):
    # The process is killed while its third call hangs; the two finished ones are on disk.
    with ScriptedServer(text("a"), text("b"), slow(30.0)) as server:
        code = f"""
            from lib.caching_and_prompting import *
            model = ChatModel(resolve_chat_model("openai:m").provider, "m", {server.url + "/v1"!r})
            with ChatClient(model, {str(tmp_path)!r}, RetryPolicy(parallel=1)) as chat:
                chat.ask([ChatRequest(f"q{{i}}") for i in range(3)], ChatOptions())
        """
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=REPOSITORY,
                                   env={**os.environ, "PYTHONPATH": str(REPOSITORY)})  # fmt: skip
        deadline = time.monotonic() + 30
        while len(server.requests) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait()
        assert len(server.requests) == 3
        server.replies = [text("c")]
        with client(Provider.OPENAI, server, tmp_path) as chat:
            replies = chat.ask([ChatRequest(f"q{i}") for i in range(3)], ChatOptions())
        assert [reply.text for reply in replies] == ["a", "b", "c"]
        assert len(server.requests) == 4


def test_a_broken_cache_is_one_clear_error(tmp_path):
    (tmp_path / "chat_calls.sqlite").write_text("this is no database" * 100)
    with pytest.raises(UserError, match="delete it"):
        ChatClient(ChatModel(Provider.LOCAL, "m"), tmp_path).check()


# ---------------------------------------------------------------- keys


def test_a_hosted_model_without_a_key_says_which(tmp_path):
    for name, variable in (("gpt-4o", "OPENAI_API_KEY"), ("groq:x", "GROQ_API_KEY")):
        with ChatClient(resolve_chat_model(name), tmp_path) as chat, pytest.raises(UserError, match=variable):
            chat.ask([ChatRequest("hello")], OPTIONS)


def test_a_key_is_sent_and_shows_nowhere_else(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    caplog.set_level(logging.DEBUG, logger="lib")
    with ScriptedServer(status(500, "your key sk-secret-123 is fine"), text("ok")) as server:
        assert ask(Provider.OPENAI, server, tmp_path)[0].text == "ok"
        reply = ask(
            Provider.OPENAI, ScriptedServerStub(server, status(500, "sk-secret-123")), tmp_path, ["new"], attempts=1
        )
    assert "sk-secret-123" not in caplog.text + reply[0].error
    for path in tmp_path.rglob("*"):
        assert b"sk-secret-123" not in path.read_bytes()


def ScriptedServerStub(server: ScriptedServer, reply) -> ScriptedServer:
    """The same server with another script."""
    server.replies = [reply]
    return server


def test_keys_from_the_credentials_file(monkeypatch, tmp_path):
    path = tmp_path / "credentials.env"
    path.write_text("# keys\nexport OPENAI_API_KEY=sk-1\nGROQ_API_KEY='g 2'\n\n# export X=y\n")
    monkeypatch.undo()
    monkeypatch.setattr(chat_backends, "CREDENTIALS_FILE", path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    chat_backends._credentials.cache_clear()
    assert chat_backends.api_key("OPENAI_API_KEY") == "sk-1"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env")
    assert chat_backends.api_key("OPENAI_API_KEY") == "sk-env"
    chat_backends._credentials.cache_clear()


def test_sdks_load_only_when_used():
    code = (
        "import sys, lib.caching_and_prompting; print(sorted({'openai', 'groq', 'ollama', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)})  # fmt: skip
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- a real server: llama.cpp with the packaged model


@pytest.fixture(scope="module")
def llama_server():
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's server for Python is not installed")
    from lib.modeling_and_ablation import find_model

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(find_model("SmolLM2-135M-Instruct").gguf)
    parameters.n_ctx, parameters.n_parallel, parameters.port, parameters.warmup = 1024, 1, 0, False
    parameters.hostnames = ["127.0.0.1"]
    parameters.cpuparams.n_threads = 1
    # Groq's client puts /openai in front of every path; the server answers under that prefix to both.
    parameters.api_prefix = "/openai"
    server = xllamacpp.Server(parameters)
    yield server.listening_address
    del server


@pytest.mark.slow
@pytest.mark.parametrize("provider", [Provider.OPENAI, Provider.GROQ], ids=lambda provider: provider.value)
def test_a_real_server_answers_and_is_asked_once(llama_server, provider, tmp_path):
    url = llama_server + ("/openai/v1" if provider is Provider.OPENAI else "")
    with ChatClient(ChatModel(provider, "smollm2", url), tmp_path) as chat:
        first = chat.ask([ChatRequest("What is the capital of France?")], ChatOptions(max_tokens=12))[0]
        assert len(first.text) > 5
    with ChatClient(ChatModel(provider, "smollm2", url), tmp_path) as chat:
        assert chat.ask([ChatRequest("What is the capital of France?")], ChatOptions(max_tokens=12))[0] == first
    with sqlite3.connect(tmp_path / "chat_calls.sqlite") as database:
        assert database.execute("SELECT COUNT(*) FROM calls").fetchone() == (1,)


@pytest.mark.slow
def test_a_real_server_keeps_to_a_schema(llama_server, tmp_path):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    with ChatClient(ChatModel(Provider.OPENAI, "smollm2", llama_server + "/openai/v1"), tmp_path) as chat:
        reply = chat.ask([ChatRequest("How many legs has a dog?")], ChatOptions(max_tokens=30, schema=schema))[0]
    assert isinstance(json.loads(reply.text)["n"], int)


@pytest.mark.slow
def test_a_local_model_answers(tmp_path):
    with ChatClient(resolve_chat_model("local:SmolLM2-135M-Instruct"), tmp_path) as chat:
        assert "Paris" in chat.ask([ChatRequest("What is the capital of France?")], ChatOptions(max_tokens=12))[0].text


def test_an_interrupted_run_stops_asking(tmp_path):
    started = threading.Event()

    def hang(handler, request):
        started.set()
        time.sleep(0.3)
        status(500)(handler, request)

    with ScriptedServer(hang) as server:
        model = ChatModel(Provider.OPENAI, "m", server.url + "/v1")

        class Stop:
            def progress(self, iterable, **_):
                started.wait(5)
                raise KeyboardInterrupt

        with ChatClient(model, tmp_path, RetryPolicy(parallel=1), sleep=lambda _: None) as chat:
            with pytest.raises(KeyboardInterrupt):
                chat.ask([ChatRequest(f"q{i}") for i in range(5)], OPTIONS, Stop())
            time.sleep(1.0)
        assert len(server.requests) <= 2
