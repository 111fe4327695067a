"""Finding, loading and running models."""

from __future__ import annotations

import pytest
import torch

from lib.cli import UserError
from lib.modeling_and_ablation import choose_device, find_model, load_language_model, model_identity
from lib.neurons import Neuron, parse_neuron
from tests.models import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_loads_from_its_folder(family, tmp_path):
    lm = tiny_model(family, seed=1)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path))
    prompts = ["1+2=", "100-7="]
    assert loaded.generate(prompts, 4) == lm.generate(prompts, 4)
    assert loaded.digest == lm.digest
    assert str(tmp_path.parent) not in str(model_identity(str(tmp_path)))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_settings_of_a_model_that_are_cut_off_are_not_done_without(name, tmp_path):
    # Without its generation_config.json a model still loads, and stops at other tokens.
    lm = tiny_model("llama", seed=1)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_text((tmp_path / name).read_text()[:-3])
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        load_language_model(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_batching_does_not_change_answers(family):
    lm = tiny_model(family, seed=2)
    prompts = ["1+2=", "10+20=", "a", "123-4=56;"]
    assert lm.generate(prompts, 5, batch_size=4) == [lm.generate([prompt], 5)[0] for prompt in prompts]


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_batch_that_does_not_fit_is_halved_and_answers_stay_the_same(error, monkeypatch):
    lm = tiny_model("llama", seed=2)
    prompts = [f"{number}+{number * 7}=" for number in range(11)]
    whole = lm.generate(prompts, 3)
    original, sizes = type(lm)._generate_batch, []

    def small_memory(self, ids, *rest):
        sizes.append(len(ids))
        if len(ids) > 3:
            raise error("too much")
        return original(self, ids, *rest)

    monkeypatch.setattr(type(lm), "_generate_batch", small_memory)
    assert lm.generate(prompts, 3, batch_size=10) == whole
    assert sizes == [10, 5, 3, 3, 3, 2]
    monkeypatch.setattr(type(lm), "_generate_batch", lambda *args: (_ for _ in ()).throw(error("too much")))
    with pytest.raises(UserError, match="one prompt does not fit"):
        lm.generate(prompts, 3, batch_size=10)


def test_bos_is_part_of_the_tokens():
    assert tiny_model("llama").tokenize(["1+"])[0][0] != 2
    assert tiny_model("llama", with_bos=True).tokenize(["1+"])[0][0] == 2


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "absent.gguf", "a/b/c"])
def test_missing_models_are_user_errors(name):
    with pytest.raises(UserError, match="not found"):
        find_model(name)


def test_unsupported_architecture(tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=50)
    ).save_pretrained(tmp_path)
    tiny_model("llama").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"bert"):
        load_language_model(str(tmp_path))


def test_broken_folder_is_a_user_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load the model"):
        load_language_model(str(tmp_path))
    with pytest.raises(UserError, match="no config.json"):
        find_model(str(tmp_path.parent))


def test_revisions():
    source = find_model("EleutherAI/pythia-70m@step3000")
    assert (source.name, source.revision) == ("EleutherAI/pythia-70m", "step3000")


def test_devices():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="unknown device"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA"):
            choose_device("cuda:0")


def test_neuron_names():
    neuron = parse_neuron("a16.h21:7")
    assert neuron == Neuron("a16.h21", 7)
    assert (neuron.layer, neuron.head, neuron.key, str(neuron)) == (16, 21, "a16_h21_7", "a16.h21:7")
    for text in ("m1", "x1:2", "m1:-2", "a1:3", "m1:2:3", "m١:2"):
        with pytest.raises(UserError):
            parse_neuron(text)
