"""Models from strangers run no code of their own; chat replies are data; keys go to their service and nowhere else."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import chat_backends
from lib.caching_and_prompting import CACHE_FILE, ChatClient, ChatOptions, ChatRequest, resolve_chat_model
from lib.chat_backends import confirm_recorded_server
from lib.cli import UserError
from lib.modeling_and_ablation import load_language_model
from lib.sentence_embeddings import sentence_embeddings
from lib.task_spec import resolve_task_spec
from tests.chat_servers import ScriptedServer, text
from tests.models import tiny_model
from tests.scripts import REPOSITORY

KEY = "sk-secret-0123456789"
FOREIGN_CODE = "from pathlib import Path\nPath(__file__).with_name('was_here').touch()\n{body}"


@pytest.fixture
def model_folder(tmp_path) -> Path:
    folder = tmp_path / "model"
    language_model = tiny_model("llama")
    language_model.model.save_pretrained(folder)
    language_model.tokenizer.save_pretrained(folder)
    return folder


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_code_in_a_model_folder_is_not_run_and_nobody_is_asked(model_folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    (model_folder / "own.py").write_text(FOREIGN_CODE.format(body="class OwnConfig: pass\nclass OwnModel: pass\n"))
    change_json(model_folder / "config.json", model_type="own",
                auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})  # fmt: skip
    with pytest.raises(UserError, match="cannot load the model"):
        load_language_model(str(model_folder), device="cpu")
    assert not (model_folder / "was_here").exists()


def test_code_beside_a_known_model_is_ignored(model_folder):
    (model_folder / "own.py").write_text(FOREIGN_CODE.format(body="class OwnModel: pass\nclass OwnTokenizer: pass\n"))
    change_json(model_folder / "config.json", auto_map={"AutoModelForCausalLM": "own.OwnModel"})
    change_json(model_folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})
    assert load_language_model(str(model_folder), device="cpu").n_layers == 3
    assert not (model_folder / "was_here").exists()


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['MARKER']}",)


def test_weights_that_are_a_pickle_with_code_are_refused(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MARKER", str(tmp_path / "was_here"))
    (model_folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb()}, model_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the model"):
        load_language_model(str(model_folder), device="cpu")
    (model_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="cannot load the model"):
        load_language_model(str(model_folder), device="cpu")
    assert not (tmp_path / "was_here").exists()


def test_safetensors_are_taken_before_a_pickle_beside_them(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MARKER", str(tmp_path / "was_here"))
    (model_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert load_language_model(str(model_folder), device="cpu").n_layers == 3
    assert not (tmp_path / "was_here").exists()


def test_a_chat_template_reaches_no_internals(model_folder):
    tokenizer = load_language_model(str(model_folder), device="cpu").tokenizer
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match="unsafe|access"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, os.urandom(500)])
def test_a_gguf_that_is_none_is_one_line_and_leaves_nothing(content, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match="not a GGUF model"):
        load_language_model(str(tmp_path / "m.gguf"), device="cpu", cache_dir=tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache").glob("*")} <= {".lock"}


def test_code_in_a_sentence_model_is_not_run(tmp_path):
    folder = tmp_path / "sentence"
    folder.mkdir()
    (folder / "own.py").write_text(FOREIGN_CODE.format(body="class Own: pass\n"))
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "own.Own"}]))
    with pytest.raises(UserError, match="cannot load the sentence model"):
        sentence_embeddings(str(folder), ["a"], tmp_path / "cache", batch_size=1, device="cpu")
    assert not (folder / "was_here").exists()


def test_no_source_loads_foreign_code_or_evaluates_text():
    # What would undo the tests above, anywhere in the project: each pattern with the files that may hold it.
    allowed = {
        r"trust_remote_code\s*=\s*True|[\"']trust_remote_code[\"']:\s*True": set(),
        r"weights_only\s*=\s*False|torch\.load\(": set(),
        r"allow_pickle\s*=\s*True": set(),
        r"pickle\.loads?\(|pickle\.Unpickler|read_pickle\(path_or|joblib\.load|dill": {"lib/plain_pickle.py"},
        r"(?<![\w.])eval\(|(?<![\w.])exec\(": {"lib/wasm_sandbox.py"},
        r"\.query\(|\.eval\((?!\))|numexpr": set(),
        r"shell\s*=\s*True|os\.system\(|os\.popen\(": set(),
        r"yaml\.load\(|xml\.|shelve": set(),
        r"marshal": {"lib/wasm_sandbox.py"},  # written here, read by the guest only
        r"tempfile\.mktemp\(": set(),
    }
    sources = [*REPOSITORY.glob("*.py"), *(REPOSITORY / "lib").rglob("*.py"), *(REPOSITORY / "benchmarks").glob("*.py")]
    assert len(sources) > 100
    for pattern, places in allowed.items():
        found = {path.relative_to(REPOSITORY).as_posix() for path in sources if re.search(pattern, path.read_text())}
        assert found <= places, pattern


# ---------------------------------------------------------------- keys and servers


@pytest.fixture
def key(monkeypatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return KEY


def test_a_key_is_in_no_file_message_or_argument(key, tmp_path, caplog, capsys):
    caplog.set_level("DEBUG")
    for noisy in ("openai", "httpx", "httpcore"):
        caplog.set_level("INFO", logger=noisy)
    headers = []

    def echo(handler, request):
        headers.append(handler.headers["Authorization"])
        text("fine")(handler, request)

    with ScriptedServer(echo) as server:
        model = resolve_chat_model("openai:m", server.url + "/v1")
        with ChatClient(model, tmp_path) as client:
            assert client.ask([ChatRequest("q")], ChatOptions())[0].text == "fine"
    assert headers == [f"Bearer {KEY}"]
    assert KEY.encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert (tmp_path / CACHE_FILE).is_file()
    assert KEY not in caplog.text + "".join(capsys.readouterr()) + repr(model) + str(model)


@pytest.mark.parametrize("url", ["https://me:secret@host/v1", "http://secret@host", "https://host/v1?api_key=secret"])
def test_a_key_in_an_address_is_refused_and_not_shown(url):
    with pytest.raises(UserError, match="must hold no key") as refused:
        resolve_chat_model("openai:m", url)
    assert "secret" not in str(refused.value)


def test_commands_of_the_pipeline_hold_no_key(key):
    done = subprocess.run([sys.executable, "-m", "lib.pipeline", "--dry_run", "--feature_model", "openai:m"],
                          cwd=REPOSITORY, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and KEY not in done.stdout + done.stderr


@pytest.mark.parametrize("url", ["http://evil.example/v1", "https://localhost.evil.example", "http://127.evil.example@x"])
def test_a_server_named_by_an_archive_gets_neither_key_nor_prompts(url, tmp_path):
    settings = {"task_module": "lib.tasks.bon_jailbreaking_task", "task": "bon_jailbreaking",
                "settings": {"judge": "openai:m", "judge_base_url": url, "judge_cache_dir": str(tmp_path / "calls")}}
    (tmp_path / "task_settings.json").write_text(json.dumps(settings))
    task = resolve_task_spec("lib.tasks.bon_jailbreaking_task", tmp_path)
    rows = [{"prompt": "p", "original_prompt": "p", "answer": "other", "is_jailbroken": True}]
    with pytest.raises(UserError, match="names the server"):
        task.score_answers(rows, ["an answer"])
    assert not (tmp_path / "calls").exists()


def test_a_recorded_server_is_used_when_it_is_this_machine_or_confirmed(monkeypatch, tmp_path):
    for url in ("", "http://localhost:8000/v1", "http://127.0.0.1:1", "http://[::1]:80/v1", "localhost:11434"):
        confirm_recorded_server(url, tmp_path)
    confirm_recorded_server("http://mine.example/v1", None)
    monkeypatch.setenv(chat_backends.TRUSTED_SERVERS, "http://other.example http://mine.example/v1")
    confirm_recorded_server("http://mine.example/v1", tmp_path)


def test_credentials_are_ignored_by_git_and_left_out_of_exports():
    ignored = (REPOSITORY / ".gitignore").read_text().splitlines()
    assert "credentials.env" in {line.strip().lstrip("/") for line in ignored}
    example = (REPOSITORY / "credentials.env.example").read_text()
    assert not re.search(r"^\s*(export\s+)?\w+_KEY=\S", example, re.MULTILINE)


def test_the_sandbox_child_gets_no_key(key, monkeypatch, tmp_path):
    from lib import wasm_sandbox

    class Started(BaseException):
        """The child would run now."""

    def start(command, **options):
        raise Started(sorted(options["env"]))

    monkeypatch.setattr(wasm_sandbox.subprocess, "Popen", start)
    with pytest.raises(Started) as started:
        wasm_sandbox._Worker(tmp_path / "interpreter", tmp_path)
    assert started.value.args == (["PATH"],)
