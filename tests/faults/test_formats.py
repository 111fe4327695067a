"""Damaged files of the formats that no stage's small world has: archives, GGUF models, the cache of model calls.

Each is cut off or has one bit flipped at seeded places. Allowed are one line, or what the whole file gives.
"""

from __future__ import annotations

import sqlite3
import struct
from collections import Counter
from pathlib import Path

import pytest

import check_artifacts
from lib.caching_and_prompting import CACHE_FILE, CallCache
from lib.cli import UserError, rng
from lib.gguf_files import check_gguf
from lib.modeling_and_ablation import converted_folder, load_language_model
from lib.reporting.artifacts import open_tree
from tests import published_tree
from tests.faults.trials import results
from tests.scripts import run_script


def flipped(content: bytes, place: int, bit: int) -> bytes:
    """The content with one bit the other way round."""
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def damages(content: bytes, n_cut: int, n_flipped: int, label: str, below: int | None = None):
    """Damaged contents, each with what was done; flips lie `below` that many bytes."""
    random = rng(0, "formats", label)
    for _ in range(n_cut):
        size = int(random.integers(len(content)))
        yield f"cut off after {size}", content[:size]
    for _ in range(n_flipped):
        place, bit = int(random.integers(below or len(content))), int(random.integers(8))
        yield f"bit {bit} of byte {place}", flipped(content, place, bit)


# ---------------------------------------------------------------- the cache of model calls


def reply_of(number: int) -> str:
    return f"def feature_{number}(prompt, info):\n    return len(prompt) > {number}\n" * 2


@pytest.fixture(scope="module")
def whole_cache(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("cache")
    cache = CallCache(folder)
    for number in range(40):
        cache.put(f"key {number}", "{}", reply_of(number))
    cache.close()
    return (folder / CACHE_FILE).read_bytes()


def read_all(folder: Path) -> list[str | None]:
    """Every answer, None where there is none.

    Raises:
        UserError: the file cannot be used.
    """
    cache = CallCache(folder)
    try:
        return [cache.get(f"key {number}") for number in range(40)]
    finally:
        cache.close()


def test_a_damaged_cache_of_calls_never_gives_another_answer(whole_cache, tmp_path):
    outcomes = Counter()
    for number, (what, content) in enumerate(damages(whole_cache, 40, 400, "calls")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / CACHE_FILE).write_bytes(content)
        try:
            answers = read_all(folder)
        except UserError as error:
            assert "delete it" in str(error), what
            outcomes["refused"] += 1
            continue
        lost = sum(answer is None for answer in answers)
        assert [answer or reply_of(i) for i, answer in enumerate(answers)] == [reply_of(i) for i in range(40)], what
        outcomes["asked again" if lost else "whole"] += 1
    # Every kind of ending was met; that many flips hit answers which the cache would have given altered.
    assert outcomes["refused"] >= 20 and outcomes["asked again"] >= 50 and outcomes["whole"] >= 50, outcomes


def test_a_cache_of_calls_from_before_there_were_checksums_keeps_its_answers(tmp_path):
    with sqlite3.connect(tmp_path / CACHE_FILE) as database:
        database.execute("CREATE TABLE calls (key TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL, "
                         "finished TEXT NOT NULL)")  # fmt: skip
        database.execute("INSERT INTO calls VALUES ('key', '{}', 'old', 'then')")
    for _ in range(2):
        cache = CallCache(tmp_path)
        assert cache.get("key") == "old"
        cache.close()
    with sqlite3.connect(tmp_path / CACHE_FILE) as database:
        database.execute("UPDATE calls SET reply = 'odd'")
    cache = CallCache(tmp_path)
    assert cache.get("key") is None
    cache.put("key", "{}", "new")
    assert cache.get("key") == "new"
    cache.close()


# ---------------------------------------------------------------- archives of results


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> tuple[bytes, dict[str, str], Path]:
    """A zip of results, the digest of each file in it, and a checkout's folder that it belongs to."""
    root = tmp_path_factory.mktemp("archive")
    tree = published_tree.build(root, tasks=("arithmetic",), models=("Tiny",), modes=("spectral_plan",), states={},
                                sensitivity=False, scores=False)  # fmt: skip
    for name in ("README.md", "requirements.txt", "run_paper_tables_generation.sh"):
        (root / name).write_text("")
    whole = results(root / "data")
    tree.zip()
    return (root / "data.zip").read_bytes(), whole, root


def test_a_damaged_archive_is_refused_or_read_as_it_was(archive, tmp_path):
    content, whole, _ = archive
    path, outcomes = tmp_path / "data.zip", Counter()
    for what, damaged in damages(content, 15, 60, "zip"):
        path.write_bytes(damaged)
        try:
            with open_tree(path) as folder:
                assert results(folder / "data") == whole, what
            outcomes["whole"] += 1
        except UserError as error:
            assert str(path) in str(error), what
            outcomes["refused"] += 1
    # Dates, permissions and names that are there twice may differ; everything else has a checksum.
    assert outcomes["refused"] >= 55 and outcomes["whole"] >= 2, outcomes


def test_the_check_of_a_damaged_archive_is_told_in_one_line(archive, tmp_path, capsys):
    content, _, root = archive

    def check(damaged: bytes) -> tuple[int, str]:
        (root / "data.zip").write_bytes(damaged)
        return check_artifacts.main(["--root", str(root)]), capsys.readouterr().out

    assert check(content)[0] == 0
    outcomes = Counter()
    for what, damaged in damages(content, 10, 40, "check of a zip"):
        code, out = check(damaged)
        assert code in (0, 1), what
        outcomes[code] += 1
        assert code == 0 or [line for line in out.splitlines() if line.startswith("problem: ")], what
    # It reads what says which runs are there, not every table: a flip elsewhere is met when the tables are made.
    assert outcomes[1] >= 15, outcomes
    (root / "data.zip").write_bytes(content)


def test_tables_of_a_damaged_archive_are_not_begun(archive, tmp_path, capsys):
    (tmp_path / "data.zip").write_bytes(archive[0][: len(archive[0]) * 2 // 3])
    arguments = ["--data_root", tmp_path / "data.zip", "--out_dir", tmp_path / "out", "--quiet"]
    assert run_script("make_paper_tables", arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- GGUF models


def write_gguf(path: Path) -> None:
    """A random Llama of two layers with a tokenizer of one token per character."""
    from gguf import GGUFWriter

    tokens = ["<unk>", "<eos>", "<bos>", "<pad>", *"0123456789+-*/=;,", "Ġ", *"abcdefghijklmnopqrstuvwxyz", "01"]
    width, hidden, random = 16, 32, rng(0, "gguf")
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["0 1"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    shapes = {"token_embd": (len(tokens), width), "output": (len(tokens), width), "output_norm": (width,)}
    for layer in range(2):
        halves = {"attn_k": (width // 2, width), "attn_v": (width // 2, width)}
        parts = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_output": (width, width),
                 "ffn_gate": (hidden, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden)}  # fmt: skip
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in (parts | halves).items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) * 0.35).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path.read_bytes()


def test_a_damaged_gguf_is_refused_or_another_model(gguf, tmp_path):
    path, models, outcomes = tmp_path / "m.gguf", tmp_path / "models", Counter()
    path.write_bytes(gguf)
    assert converted_folder(path, models).is_dir()
    n_header = gguf.index(b"token_embd") + 1500
    for what, content in damages(gguf, 15, 25, "gguf", below=n_header):
        path.write_bytes(content)
        before = set(models.iterdir())
        try:
            folder = converted_folder(path, models)
        except UserError as error:
            assert "is not a GGUF model" in str(error), what
            assert set(models.iterdir()) == before, what
            outcomes["refused"] += 1
        else:
            # Another digest, so a folder of its own: the whole model's is never taken for it.
            assert what.startswith("bit") and folder not in before, what
            outcomes["another model"] += 1
    assert outcomes["refused"] >= 22 and outcomes["another model"] >= 4, outcomes


@pytest.mark.parametrize("name, value", [
    (b"llama.block_count", 2**29 + 2), (b"llama.embedding_length", 2**30), (b"llama.feed_forward_length", 2**31),
    (b"llama.attention.head_count", 500),
])  # fmt: skip
def test_a_gguf_that_asks_for_more_than_its_tensors_is_refused_before_it_is_built(name, value, gguf, tmp_path):
    place = gguf.index(name) + len(name) + 4
    (tmp_path / "m.gguf").write_bytes(gguf[:place] + struct.pack("<I", value) + gguf[place + 4 :])
    with pytest.raises(UserError, match=f"{name.decode()} is {value}"):
        converted_folder(tmp_path / "m.gguf", tmp_path / "models")


def test_a_gguf_that_promises_more_elements_than_it_has_is_refused(gguf, tmp_path):
    place = gguf.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    (tmp_path / "m.gguf").write_bytes(gguf[:place] + struct.pack("<Q", 2**50) + gguf[place + 8 :])
    with pytest.raises(UserError, match="not a GGUF model that can be read"):
        converted_folder(tmp_path / "m.gguf", tmp_path / "models")


def test_a_big_endian_header_is_read(tmp_path):
    header = b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + struct.pack(">Q", 3) + b"a.b" + struct.pack(">II", 4, 7)
    (tmp_path / "m.gguf").write_bytes(header)
    check_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(header[:-1])
    with pytest.raises(UserError, match="ends 1 bytes too early"):
        check_gguf(tmp_path / "m.gguf")


def test_converted_weights_that_are_cut_off_are_one_line(gguf, tmp_path):
    (tmp_path / "m.gguf").write_bytes(gguf)
    (weights,) = converted_folder(tmp_path / "m.gguf", tmp_path / "models").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded|cannot load"):
        load_language_model(str(tmp_path / "m.gguf"), device="cpu", cache_dir=tmp_path / "models")
