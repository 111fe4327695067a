"""HANS: reading the file, drawing, labels of answers, the 11 features; the download with every way it can fail."""

from __future__ import annotations

import http.server
import threading
from collections import Counter

import numpy as np
import pytest

from lib import downloads
from lib.cli import UserError
from lib.downloads import download
from lib.tasks import hans_nli_task
from lib.tasks.hans_nli_task import HansSettings, HansTask, is_subsequence, parse_hans, predicted_label, prompt_text
from tests.models import tiny_model
from tests.scripts import run_script

HEADER = "gold_label\tsentence1\tsentence2\tpairID\theuristic\tsubcase\ttemplate"
ROWS = [
    "entailment\tThe cat saw the dog .\tThe cat saw the dog .\tex0\tsubsequence\tse_a\tt1",
    "non-entailment\tThe dog never saw a cat .\tThe cat saw the dog .\tex1\tlexical_overlap\tln_b\tt2",
    "-\tUnlabelled .\tText .\tex2\tconstituent\tcn_c\tt3",
    "entailment\tIf the cat saw, the dog ran .\tThe dog ran .\tex3\tconstituent\tce_c\tt3",
]
TEXT = "\n".join([HEADER, *ROWS]) + "\n"


@pytest.fixture
def hans_file(tmp_path):
    path = tmp_path / "hans.txt"
    path.write_text(TEXT)
    return path


def task(path, **settings) -> HansTask:
    return HansTask(HansSettings(hans_file=str(path), num_examples=0, **settings))


# ---------------------------------------------------------------- the file


def test_what_is_derived_from_the_words():
    first, second, third = parse_hans(TEXT, "validation", "test")
    assert (first["expected_label"], second["expected_label"], third["example_id"]) == ("E", "N", 3)
    # "never" and "a" of the premise; hypothesis content words: cat, saw, dog.
    assert second["premise_num_words"] == 6
    assert second["premise_content_words"] == 4
    assert (second["lexical_overlap_ratio"], second["full_lexical_overlap"]) == (1.0, True)
    assert (second["hypothesis_is_subsequence"], second["premise_has_negation"]) == (False, True)
    assert second["hypothesis_has_negation"] is False
    assert first["hypothesis_num_chars"] == len("The cat saw the dog .")


def test_a_part_of_the_words_gives_a_part_of_the_overlap():
    text = f"{HEADER}\nentailment\tA cat .\tThe cat ran far .\tp\th\ts\tt\n"
    assert parse_hans(text, "train", "test")[0]["lexical_overlap_ratio"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("inner", "outer", "expected"), [("", "ab", True), ("ab", "axb", True), ("ba", "axb", False)])
def test_subsequences(inner, outer, expected):
    assert is_subsequence(list(inner), list(outer)) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\n1\t2\n", "no gold_label"),
        (f"{HEADER}\nmaybe\ta\tb\tp\th\ts\tt\n", "unknown label 'maybe'"),
        (HEADER + "\n", "no labelled examples"),
        ("", "no gold_label"),
        ("<html>not found</html>", "no gold_label"),
    ],
)
def test_other_files_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_hans(text, "validation", "test")


def test_a_missing_pair_id_is_made_up():
    text = "label\tpremise\thypothesis\theuristic\tsubcase\ttemplate\nentailment\ta\tb\th\ts\tt\n"
    assert parse_hans(text, "train", "test")[0]["pair_id"] == "train_0"


def test_prompts_end_with_the_pair_in_question():
    text = prompt_text("A b .", "B .", few_shot=1)
    assert text.endswith("Label: E\n\nPremise: A b .\nHypothesis: B .\nLabel:")
    assert prompt_text("A b .", "B .", few_shot=0).count("Premise") == 1


# ---------------------------------------------------------------- drawing


def many(n_entailed: int, n_other: int) -> list[dict]:
    return [{"expected_label": "E" if index < n_entailed else "N", "n": index} for index in range(n_entailed + n_other)]


def test_a_balanced_draw_and_its_seed():
    first, again, other = (hans_nli_task.draw(many(50, 50), 21, True, seed) for seed in (1, 1, 2))
    assert Counter(example["expected_label"] for example in first) == {"E": 10, "N": 11}
    assert first == again != other
    assert len({example["n"] for example in first}) == 21


def test_too_few_of_a_label_is_said():
    with pytest.raises(UserError, match="10 examples labelled E, the file has 3"):
        hans_nli_task.draw(many(3, 50), 20, True, 0)
    assert len(hans_nli_task.draw(many(3, 50), 20, False, 0)) == 20


@pytest.mark.parametrize("n_examples", [0, -1, 53, 1000])
def test_all_examples_where_that_many_are_asked_for(n_examples):
    assert hans_nli_task.draw(many(3, 50), n_examples, True, 0) == many(3, 50)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (" E\nP:", "E"),
        ("E or N", "N"),
        ("It is N because E", "E"),
        ("N/A", "N"),
        ("Non-entailment", "N"),
        ("nonentailment", "N"),
        ("an entailment", "E"),
        ("Yes", None),
        ("EN", None),
        ("", None),
    ],
)
def test_labels_of_answers(answer, label):
    assert predicted_label(answer) == label


def test_the_cache_has_the_published_keys_and_comes_back(hans_file):
    hans = task(hans_file)
    examples = hans.examples(0)
    cache = hans.cache_from_answers(examples, [" E", " E", "?"])
    assert [item["is_correct"] for item in cache] == [True, False, False]
    assert [item["predicted_label"] for item in cache] == ["E", "E", None]
    assert list(cache[0])[:7] == [
        "example_id",
        "pair_id",
        "split",
        "premise",
        "hypothesis",
        "gold_label",
        "expected_label",
    ]
    assert list(cache[0])[-5:] == ["prompt", "dataset_index", "raw_output", "predicted_label", "is_correct"]
    statistics = hans.get_basic_statistics(hans.dataset_from_cache(cache))
    assert statistics["label_counts"] == {"E": 2, "N": 1}
    assert statistics["predicted_label_counts"] == {"E": 2, "none": 1}
    assert statistics["accuracy_by_heuristic"]["constituent"] == {"accuracy": 0.0, "n": 1}
    assert statistics["accuracy_by_subcase"]["se_a"]["accuracy"] == 1.0


@pytest.mark.parametrize("cache", [[], {}, [{"prompt": "x"}], [1]])
def test_other_caches_are_refused(cache):
    with pytest.raises(UserError):
        HansTask().dataset_from_cache(cache)


def test_all_features_equal_their_row_functions(hans_file):
    hans = task(hans_file)
    frame = hans.dataset_from_cache(hans.cache_from_answers(hans.examples(0), ["E"] * 3))
    columns = hans.native_columns(frame)
    features = hans.SEED_FEATURES
    assert len({feature.label for feature in features}) == 11
    for feature in features:
        namespace: dict = {}
        exec(feature.python_src, namespace)  # our own source
        rows = [
            namespace[feature.fn_name](row["prompt"], hans.parse_prompt_row(row)) for row in frame.to_dict("records")
        ]
        np.testing.assert_array_equal(feature.native(columns), rows, err_msg=feature.label)


# ---------------------------------------------------------------- settings


def test_settings_come_from_the_environment_and_flags_win(monkeypatch, hans_file, tmp_path, capsys):
    monkeypatch.setenv("HANS_LOCAL_FILE", str(hans_file))
    monkeypatch.setenv("HANS_NUM_EXAMPLES", "2")
    monkeypatch.setenv("HANS_BALANCE_LABELS", "0")
    folder = tmp_path / "tiny"
    tiny_model("llama").model.save_pretrained(folder)
    tiny_model("llama").tokenizer.save_pretrained(folder)
    common = ["--task_module", "lib.tasks.hans_nli_task", "--ai_model", folder, "--quiet"]
    for extra, count in (([], 2), (["--num_examples", "1", "--few_shot", "0"], 1)):
        cache = tmp_path / f"cache{count}" / "llm_io_data.pkl"
        arguments = [*common, "--few_shot", "0", *extra, "--prompts_answers_pkl_file", cache]
        assert run_script("1_generate_prompts_and_answers", arguments) == 0
        assert f'"n_examples": {count}' in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"hans_split": "test"}, {"few_shot": 9}, {"max_new_tokens": 0}])
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(UserError, match="--"):
        HansSettings(**wrong)


def test_a_local_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="HANS_LOCAL_FILE"):
        task(tmp_path / "absent.txt").examples(0)


# ---------------------------------------------------------------- the download


class Server:
    """A local server that gives each request the next of its replies: (status, body, announced length)."""

    def __init__(self, *replies):
        self.replies, self.n_requests = list(replies), 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                status, body, length = outer.replies[min(outer.n_requests, len(outer.replies) - 1)]
                outer.n_requests += 1
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/"


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(downloads, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(downloads, "TIMEOUT_SECONDS", 5.0)
    servers = []

    def start(*replies):
        servers.append(
            Server(*[(status, body, len(body) if length is None else length) for status, body, length in replies])
        )
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def accept(content: bytes) -> None:
    if b"good" not in content:
        raise UserError("wrong content")


def test_a_download_is_retried_until_it_is_whole_and_right(serve, tmp_path):
    server = serve((500, b"error", None), (200, b"goo", 4), (200, b"good", None))
    path = download(server.url, tmp_path / "a/file", what="X", hint="give it", check=accept)
    assert path.read_bytes() == b"good"
    assert server.n_requests == 3
    download(server.url, path, what="X", hint="give it", check=accept)
    assert server.n_requests == 3


def test_wrong_content_leaves_nothing_and_says_what_to_do(serve, tmp_path):
    server = serve((200, b"<html>", None))
    with pytest.raises(UserError, match="wrong content.*give it"):
        download(server.url, tmp_path / "file", what="X", hint="give it", check=accept)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_of_an_earlier_time_is_replaced(serve, tmp_path):
    (tmp_path / "file").write_bytes(b"half")
    path = download(serve((200, b"good", None)).url, tmp_path / "file", what="X", hint="", check=accept)
    assert path.read_bytes() == b"good"


def test_offline_names_the_local_file(monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(hans_nli_task, "BASE_URL", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match="HANS_LOCAL_FILE"):
        HansTask(HansSettings(hans_cache_dir=str(tmp_path))).examples(0)


def test_a_file_of_another_size_than_published_is_not_taken(serve, monkeypatch, tmp_path):
    monkeypatch.setattr(hans_nli_task, "BASE_URL", serve((200, TEXT.encode(), None)).url)
    with pytest.raises(UserError, match="3 examples instead of 30000"):
        HansTask(HansSettings(hans_cache_dir=str(tmp_path))).examples(0)


# ---------------------------------------------------------------- real data


def test_the_real_file(test_data):
    path = test_data / "hans" / "heuristics_evaluation_set.txt"
    examples = HansTask(HansSettings(hans_file=str(path))).examples(42)
    assert Counter(example["expected_label"] for example in examples) == {"E": 512, "N": 512}
    every = task(path).examples(0)
    assert len(every) == 3000
    assert len({example["subcase"] for example in every}) == 30
    assert {example["heuristic"] for example in every} == set(hans_nli_task.HEURISTICS)
    # The heuristics are what they say: overlap is full everywhere, subsequences and constituents are in order.
    assert np.mean([example["full_lexical_overlap"] for example in every]) > 0.99
    ordered = [example["hypothesis_is_subsequence"] for example in every if example["heuristic"] != "lexical_overlap"]
    assert np.mean(ordered) > 0.99


def test_all_features_reach_the_table(test_data, tmp_path):
    hans = HansTask(HansSettings(hans_file=str(test_data / "hans" / "heuristics_evaluation_set.txt"), num_examples=200))
    from lib.artifacts import read_json, write_pickle
    from lib.scores_table import load_scores

    examples = hans.examples(1)
    answers = ["E" if example["hypothesis_is_subsequence"] else "N" for example in examples]
    write_pickle(tmp_path / "llm_io_data.pkl", hans.cache_from_answers(examples, answers))
    arguments = ["--no_llm", "--quiet", "--task_module", "lib.tasks.hans_nli_task", "-i", tmp_path / "llm_io_data.pkl"]
    assert run_script("2_generate_features", [*arguments, "-o", tmp_path / "report"]) == 0
    table = load_scores(tmp_path / "report", hans)
    # By construction each HANS hypothesis has only words of its premise, and none of them is a negation.
    constant = {"Full lexical overlap": 1.0, "Lexical overlap ratio": 1.0, "Hypothesis has negation": 0.0}
    rejected = read_json(tmp_path / "report/rejected_features.json", "rejected features")
    assert {entry["label"]: entry["filter"] for entry in rejected} == dict.fromkeys(constant, "constant")
    for entry in rejected:
        assert set(table.frame[entry["column"]]) == {constant[entry["label"]]}
        assert entry["column"] not in table.feature_names
    assert len(table.feature_names) == 8
    assert {"premise_num_words", "dataset_split", "lexical_overlap_ratio"} <= set(table.frame.columns)
