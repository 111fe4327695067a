"""Tiny random language models of each supported family, built from configurations with fixed seeds."""

from __future__ import annotations

import functools

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lib.modeling_and_ablation import LanguageModel

FAMILIES = ("llama", "qwen2", "gpt2", "gptj")
CHARACTERS = "0123456789+-*/=;, abcdefghijklmnopqrstuvwxyz"


def tiny_tokenizer(*, with_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per character; `with_bos` puts a BOS token in front of every text."""
    vocabulary = {"<unk>": 0, "<eos>": 1, "<bos>": 2, "<pad>": 3}
    vocabulary |= {character: index + 4 for index, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if with_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )


def _network(family: str, n_layers: int, d_model: int, vocab_size: int) -> PreTrainedModel:
    rope = {
        "max_position_embeddings": 128,
        "vocab_size": vocab_size,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "pad_token_id": 3,
    }
    llama = {
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **rope,
    }
    gpt = {
        "n_positions": 128,
        "n_embd": d_model,
        "n_layer": n_layers,
        "n_head": 4,
        "vocab_size": vocab_size,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "pad_token_id": 3,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**llama))
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**llama, tie_word_embeddings=True))
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**gpt))
    return GPTJForCausalLM(GPTJConfig(**gpt, rotary_dim=4))


@functools.lru_cache(maxsize=16)
def tiny_model(
    family: str, seed: int = 0, *, n_layers: int = 3, d_model: int = 16, with_bos: bool = False
) -> LanguageModel:
    """A random model of the family with weights large enough that ablating a coordinate changes answers."""
    tokenizer = tiny_tokenizer(with_bos=with_bos)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = _network(family, n_layers, d_model, len(tokenizer))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.35)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return LanguageModel(network, tokenizer, f"tiny-{family}")
