"""One call to a chat model of each provider: a text, or an error that says whether to try again.

An SDK is imported only when its provider is used. Keys come from the environment or from `credentials.env`; they are
never part of a message, a cache key or a file.
"""

from __future__ import annotations

import functools
import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lib.cli import UserError

CREDENTIALS_FILE = Path(__file__).resolve().parents[1] / "credentials.env"
_OPENAI_NAMES = re.compile(r"(?:chatgpt-|gpt-\d|o\d)")
_REASONING_NAMES = re.compile(r"(?:o\d|gpt-5)")
MAX_RETRY_AFTER_SECONDS = 120.0
TRUSTED_SERVERS = "TRUSTED_CHAT_SERVERS"


class Provider(Enum):
    """Who answers."""

    OLLAMA = "ollama"
    """A local or remote Ollama server."""

    OPENAI = "openai"
    """OpenAI, or any server that speaks its protocol (`--base_url`)."""

    GROQ = "groq"
    """Groq's hosted models."""

    LOCAL = "local"
    """A Hugging Face model in this process; greedy."""


@dataclass(frozen=True)
class ChatModel:
    """A model and who serves it."""

    provider: Provider
    name: str
    base_url: str = ""

    def __str__(self) -> str:
        return f"{self.provider.value}:{self.name}" + (f" at {self.base_url}" if self.base_url else "")


def resolve_chat_model(text: str, base_url: str = "") -> ChatModel:
    """The model that a name on the command line means.

    `provider:model` is taken by its word. Otherwise a base URL means a server with OpenAI's protocol; `gpt-<digit>...`,
    `chatgpt-...` and `o<digit>...` are OpenAI's; everything else, such as `gemma3:27b` or `gpt-oss:20b`, is Ollama's.
    """
    if "@" in base_url or "?" in base_url:
        raise UserError("a server's address must hold no key or password, as it is recorded and shown; set the key in "
                        "the environment or in credentials.env")
    prefix, colon, rest = text.partition(":")
    if colon and prefix in {provider.value for provider in Provider}:
        if not rest:
            raise UserError(f"{text!r} names a provider but no model; write {prefix}:<model>")
        return ChatModel(Provider(prefix), rest, base_url)
    if not text:
        raise UserError("the chat model has no name; write <provider>:<model>")
    if base_url or _OPENAI_NAMES.match(text):
        return ChatModel(Provider.OPENAI, text, base_url)
    return ChatModel(Provider.OLLAMA, text)


@dataclass(frozen=True)
class ChatOptions:
    """How an answer is made; all of it is part of the cache key."""

    temperature: float = 0.0
    max_tokens: int = 2048
    seed: int = 42
    schema: dict[str, Any] | None = None
    """JSON schema that the answer should follow, where the provider can enforce it."""


@dataclass(frozen=True)
class ChatRequest:
    """One question. `sample` tells apart repetitions of the same question."""

    prompt: str
    system: str = ""
    sample: int = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]


class ChatFailure(Exception):
    """A call failed. `retry_after`: seconds that the server asks to wait, None if it says nothing."""

    def __init__(self, message: str, *, permanent: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.retry_after = retry_after


def api_key(name: str) -> str:
    """A key from the environment, else from `credentials.env`; empty if there is none."""
    return os.environ.get(name, "").strip() or _credentials().get(name, "")


@functools.cache
def _credentials() -> dict[str, str]:
    if not CREDENTIALS_FILE.is_file():
        return {}
    pattern = re.compile(r"\s*(?:export\s+)?([A-Z_]+)=['\"]?([^'\"#\s]*)")
    matches = (pattern.match(line) for line in CREDENTIALS_FILE.read_text(encoding="utf-8").splitlines())
    return {match[1]: match[2] for match in matches if match}


def confirm_recorded_server(base_url: str, recorded_in: Path | None) -> None:
    """Refuse a server that only a file names: whoever made the file would get prompts, answers and the key.

    A server on this machine is allowed, and one that the environment variable TRUSTED_CHAT_SERVERS names (several are
    separated by spaces).

    Raises:
        UserError: it is neither.
    """
    if not base_url or recorded_in is None or base_url in os.environ.get(TRUSTED_SERVERS, "").split():
        return
    host = urlsplit(base_url if "://" in base_url else f"//{base_url}").hostname or ""
    if host != "localhost" and not host.startswith("127.") and host != "::1":
        raise UserError(f"{recorded_in} names the server {base_url!r}: prompts, answers and your key would go there; "
                        f"if it is yours, set {TRUSTED_SERVERS}={base_url}")


class ChatBackend(ABC):
    """A provider's client."""

    def __init__(self, model: ChatModel, timeout: float) -> None:
        self.model = model
        self.timeout = timeout

    @abstractmethod
    def complete(self, request: ChatRequest, options: ChatOptions) -> str:
        """The answer's text.

        Raises:
            ChatFailure: no answer.
        """


def _without_key(message: str, key: str) -> str:
    text = " ".join(message.split())
    return (text.replace(key, "***") if key else text)[:300]


class _OpenAIProtocol(ChatBackend):
    """OpenAI and Groq: the two SDKs have one shape."""

    key_name: str

    def __init__(self, model: ChatModel, timeout: float) -> None:
        super().__init__(model, timeout)
        self._key = api_key(self.key_name)
        if not self._key and not model.base_url:
            raise UserError(f"{model} needs a key: set {self.key_name} in the environment or in credentials.env")
        from lib.http_deadline import deadline_hooks

        self._sdk, client_class = self._load_sdk()
        # Retries are ours: the SDK's own would multiply with them.
        options = {"base_url": model.base_url} if model.base_url else {}
        http_client = self._sdk.DefaultHttpxClient(event_hooks=deadline_hooks(timeout))
        self._client = client_class(api_key=self._key or "none", timeout=timeout, max_retries=0,
                                    http_client=http_client, **options)

    @abstractmethod
    def _load_sdk(self) -> tuple[Any, Any]:
        """The SDK's module and its client class."""

    def complete(self, request: ChatRequest, options: ChatOptions) -> str:
        try:
            done = self._client.chat.completions.create(
                model=self.model.name, messages=request.messages, **self._parameters(request, options))
        except self._sdk.APIStatusError as error:
            if error.status_code == 400 and options.schema is not None and "response_format" in str(error):
                # Not every model can be held to a schema; the reader of the reply checks it anyway.
                return self.complete(request, replace(options, schema=None))
            raise self._status_failure(error) from None
        except self._sdk.APIConnectionError as error:
            cause = f": {error.__cause__}" if error.__cause__ else ""
            raise ChatFailure(_without_key(f"{error}{cause}", self._key)) from None
        except (self._sdk.APIError, ValueError, TypeError) as error:
            raise ChatFailure(_without_key(f"unreadable reply: {error}", self._key)) from None
        choices = getattr(done, "choices", None)
        return (choices[0].message.content or "") if choices and choices[0].message else ""

    def _parameters(self, request: ChatRequest, options: ChatOptions) -> dict[str, Any]:
        hosted = self.model.provider is Provider.OPENAI and not self.model.base_url
        if hosted and _REASONING_NAMES.match(self.model.name):
            parameters: dict[str, Any] = {"max_completion_tokens": options.max_tokens}
        else:
            parameters = {"max_tokens": options.max_tokens, "temperature": options.temperature,
                          "seed": (options.seed + request.sample) & 0x7FFFFFFF}
        if options.schema is not None:
            schema = {"name": "reply", "schema": options.schema}
            parameters["response_format"] = {"type": "json_schema", "json_schema": schema}
        return parameters

    def _status_failure(self, error: Any) -> ChatFailure:
        code = error.status_code
        message = _without_key(f"HTTP {code}: {error.message}", self._key)
        wait = _seconds(error.response.headers.get("retry-after"))
        return ChatFailure(message, permanent=code < 500 and code not in (408, 409, 425, 429), retry_after=wait)


def _seconds(text: str | None) -> float | None:
    try:
        return min(max(float(text or ""), 0.0), MAX_RETRY_AFTER_SECONDS)
    except ValueError:
        return None


class OpenAIBackend(_OpenAIProtocol):
    """OpenAI's API, or a server that speaks it."""

    key_name = "OPENAI_API_KEY"

    def _load_sdk(self) -> tuple[Any, Any]:
        import openai

        return openai, openai.OpenAI


class GroqBackend(_OpenAIProtocol):
    """Groq's API."""

    key_name = "GROQ_API_KEY"

    def _load_sdk(self) -> tuple[Any, Any]:
        import groq

        return groq, groq.Groq


class OllamaBackend(ChatBackend):
    """An Ollama server: `--base_url`, else OLLAMA_HOST, else the local default."""

    def __init__(self, model: ChatModel, timeout: float) -> None:
        super().__init__(model, timeout)
        import ollama

        from lib.http_deadline import deadline_hooks

        self._sdk = ollama
        self._client = ollama.Client(host=model.base_url or None, timeout=timeout,
                                     event_hooks=deadline_hooks(timeout))

    def complete(self, request: ChatRequest, options: ChatOptions) -> str:
        import httpx

        # A context that holds question and answer: Ollama would cut a longer one without a word.
        n_context = 1024 * -(-(sum(len(m["content"]) for m in request.messages) // 2 + options.max_tokens) // 1024)
        settings = {"temperature": options.temperature, "seed": options.seed + request.sample,
                    "num_predict": options.max_tokens, "num_ctx": max(n_context, 4096)}
        try:
            reply = self._client.chat(model=self.model.name, messages=request.messages, options=settings,
                                      format=options.schema)
        except self._sdk.ResponseError as error:
            permanent = 400 <= error.status_code < 500 and error.status_code not in (408, 429)
            hint = f"; run: ollama pull {self.model.name}" if error.status_code == 404 else ""
            message = f"HTTP {error.status_code}: {_without_key(error.error, '')}{hint}"
            raise ChatFailure(message, permanent=permanent) from None
        except ConnectionError:
            raise ChatFailure("no Ollama server answers; start it with: ollama serve") from None
        except (httpx.HTTPError, ValueError, TypeError) as error:
            raise ChatFailure(_without_key(f"{type(error).__name__}: {error}", "")) from None
        return reply.message.content or ""


class LocalBackend(ChatBackend):
    """A Hugging Face model in this process, with its chat template."""

    def __init__(self, model: ChatModel, timeout: float) -> None:
        super().__init__(model, timeout)
        from lib.modeling_and_ablation import load_language_model

        self._language_model = load_language_model(model.name)

    def complete(self, request: ChatRequest, options: ChatOptions) -> str:
        tokenizer = self._language_model.tokenizer
        text = "\n\n".join(message["content"] for message in request.messages) + "\n\n"
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
        return self._language_model.generate([text], options.max_tokens, batch_size=1)[0].answer


BACKENDS: dict[Provider, type[ChatBackend]] = {
    Provider.OLLAMA: OllamaBackend, Provider.OPENAI: OpenAIBackend, Provider.GROQ: GroqBackend,
    Provider.LOCAL: LocalBackend}
