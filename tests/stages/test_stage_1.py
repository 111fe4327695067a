"""Stage 1: the cache of answers is made once, in shards, and never silently reused for other settings."""

from __future__ import annotations

import json
import pickle

import pytest

from lib.stages import behaviour
from lib.tasks.arithmetic_task import TASK_SPEC
from tests.models import tiny_model
from tests.scripts import run_script

FLAGS = ["--max_operand", "4", "--few_shot", "2", "--max_new_tokens", "3", "--quiet"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny = tiny_model("llama")
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(model_dir, tmp_path):
    """Runs stage 1 on the tiny model; the cache is `tmp_path/cache/llm_io_data.pkl`."""

    def stage_1(*extra: str, flags: list[str] = FLAGS) -> int:
        return run_script(
            "1_generate_prompts_and_answers",
            [
                "--ai_model",
                str(model_dir),
                "--prompts_answers_pkl_file",
                str(tmp_path / "cache/llm_io_data.pkl"),
                "--stats_json_out",
                str(tmp_path / "report"),
                *flags,
                *extra,
            ],
        )

    return stage_1


def files(folder) -> dict[str, tuple[float, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_writes_the_cache_its_record_and_statistics(run, tmp_path, capsys):
    assert run() == 0
    cache = pickle.loads((tmp_path / "cache/llm_io_data.pkl").read_bytes())
    assert {operator: len(items) for operator, items in cache.items()} == {"+": 25, "-": 25, "*": 25, "/": 16}
    assert cache["+"][0][0] == "2+3=5; 9-2=7; 0+0="
    statistics = json.loads((tmp_path / "report/dataset_stats.json").read_text())
    assert statistics["n_examples"] == 91
    assert f'"accuracy": {statistics["accuracy"]}' in capsys.readouterr().out
    record = json.loads((tmp_path / "cache/llm_io_data.run_metadata.json").read_text())
    assert record["settings"]["task_settings"]["few_shot"] == 2
    assert set(record["outputs"]) == {"llm_io_data.pkl", "llm_io_data.jsonl"}
    assert not (tmp_path / "cache/llm_io_data.parts").exists()


def test_a_second_run_changes_no_file(run, tmp_path):
    run()
    before = files(tmp_path)
    assert run("--batch_size", "7") == 0
    assert files(tmp_path) == before


def test_other_settings_are_refused_until_forced(run, tmp_path, capsys):
    run()
    other = [*FLAGS[:1], "3", *FLAGS[2:]]
    assert run(flags=other) == 2
    assert "max_operand: 4, asked for 3" in capsys.readouterr().err
    assert run("--force", flags=other) == 0
    assert json.loads((tmp_path / "report/dataset_stats.json").read_text())["n_examples"] == 3 * 16 + 9


def test_a_changed_cache_is_refused(run, tmp_path, capsys):
    run()
    path = tmp_path / "cache/llm_io_data.pkl"
    path.write_bytes(pickle.dumps({"+": [("1+1=", 2, "2", True, True)]}))
    assert run() == 2
    assert "was changed" in capsys.readouterr().err


def test_the_seed_matters_only_where_it_is_used(run):
    run()
    assert run("--seed", "7") == 0
    assert run("--limit", "10", "--force") == 0
    assert run("--limit", "10", "--seed", "7") == 2


def test_an_archived_cache_is_used_as_it_is(run, tmp_path, capsys):
    path = tmp_path / "cache/llm_io_data.pkl"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps({"+": [("3+4=", 7, "7\n", True, True), ("3+5=", None, "8, 9", False, False)]}))
    assert run() == 0
    assert "no record" in capsys.readouterr().out
    assert json.loads((tmp_path / "report/dataset_stats.json").read_text())["accuracy"] == 0.5


def test_an_unsafe_pickle_is_refused_in_one_line(run, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'pwned')!r}, 'w')",))

    path = tmp_path / "cache/llm_io_data.pkl"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(Bomb()))
    assert run() == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "pwned").exists()


def test_a_crash_loses_at_most_one_shard_and_the_result_is_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setattr(behaviour, "PROMPTS_PER_SHARD", 8)
    run("--batch_size", "8")
    whole = (tmp_path / "cache/llm_io_data.pkl").read_bytes()
    for path in (tmp_path / "cache").glob("llm_io_data*"):
        path.unlink()
    batches = []
    original = behaviour.write_json

    def killed(path, value, **options):
        if len(batches) == 5:
            raise KeyboardInterrupt
        batches.append(len(value["answers"]))
        original(path, value, **options)

    monkeypatch.setattr(behaviour, "write_json", killed)
    assert run("--batch_size", "8") == 130
    monkeypatch.setattr(behaviour, "write_json", original)
    answered = []
    from lib.modeling_and_ablation import LanguageModel

    generate = LanguageModel.generate
    monkeypatch.setattr(
        LanguageModel,
        "generate",
        lambda self, prompts, *args, **options: (answered.extend(prompts), generate(self, prompts, *args, **options))[
            1
        ],
    )
    assert run("--batch_size", "16") == 0
    assert len(answered) == 91 - 5 * 8
    assert (tmp_path / "cache/llm_io_data.pkl").read_bytes() == whole


def test_user_mistakes_are_one_line(run, capsys):
    for arguments, expected in (
        ([*FLAGS, "--operators", "x"], "operators"),
        ([*FLAGS, "--few_shot", "99"], "few_shot"),
        ([*FLAGS, "--task_module", "lib.tasks.no_task"], "no task module"),
    ):
        assert run(flags=arguments) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1


def test_a_copy_in_plain_text_stands_for_the_pickle(run, tmp_path, capsys):
    run()
    folder = tmp_path / "cache"
    lines = [json.loads(line) for line in (folder / "llm_io_data.jsonl").read_text().splitlines()]
    assert len(lines) == 91
    assert lines[0]["prompt"] == "2+3=5; 9-2=7; 0+0="
    assert all(isinstance(line["is_correct"], bool) for line in lines)
    for name in ("pkl", "jsonl"):
        arguments = ["-i", folder / f"llm_io_data.{name}", "-o", tmp_path / name, "--no_llm", "--no_plots", "--quiet"]
        assert run_script("2_generate_features", arguments) == 0
    for name in ("scores.csv", "features.json", "feature_metrics.csv", "task_settings.json"):
        assert (tmp_path / "pkl" / name).read_bytes() == (tmp_path / "jsonl" / name).read_bytes()
    assert run("--prompts_answers_pkl_file", str(folder / "llm_io_data.jsonl")) == 2
    assert "name it .pkl" in capsys.readouterr().err


def test_a_model_that_hardly_answers_is_mentioned(run, tmp_path, capsys):
    path = tmp_path / "cache/llm_io_data.pkl"
    path.parent.mkdir()
    for answers, expected in ((["7", "", "\n"], True), (["7", "8", " "], False)):
        path.write_bytes(pickle.dumps({"+": [(f"3+{n}=", None, text, False, False) for n, text in enumerate(answers)]}))
        assert run() == 0
        assert ("2 of 3 answers are empty" in capsys.readouterr().out) == expected


def test_help_lists_the_flags_of_the_named_task(capsys):
    assert run_script("1_generate_prompts_and_answers", ["--help"]) == 0
    assert "--max_operand" in capsys.readouterr().out


def test_settings_survive_the_record():
    settings = TASK_SPEC.settings
    assert type(settings).from_json(json.loads(json.dumps(settings.to_json()))) == settings
