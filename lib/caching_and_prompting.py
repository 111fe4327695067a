"""One client for chat models: bounded parallel calls, retries with patience, and a cache that no killed run loses."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from lib.artifacts import text_digest
from lib.chat_backends import (
    BACKENDS,
    ChatBackend,
    ChatFailure,
    ChatModel,
    ChatOptions,
    ChatRequest,
    Provider,
    resolve_chat_model,
)
from lib.cli import Report, UserError

__all__ = ["ChatClient", "ChatModel", "ChatOptions", "ChatReply", "ChatRequest", "RetryPolicy", "resolve_chat_model"]

CACHE_FILE = "chat_calls.sqlite"
_log = logging.getLogger(__name__)


class ChatReply(NamedTuple):
    """An answer, or why there is none."""

    text: str | None
    error: str = ""


@dataclass(frozen=True)
class RetryPolicy:
    """How hard to try. `budget` bounds the attempts of one `ask` over all its questions."""

    attempts: int = 5
    first_wait: float = 1.0
    longest_wait: float = 60.0
    budget: int = 10_000
    timeout: float = 300.0
    parallel: int = 4


class CallCache:
    """Finished calls on disk, one transaction each: what was answered once is never asked again.

    SQLite does not notice an altered byte, so each answer has a checksum; one that does not match is asked again.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / CACHE_FILE
        with self._errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self._path, timeout=60, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS calls (key TEXT PRIMARY KEY, request TEXT NOT NULL, "
                                   "reply TEXT NOT NULL, finished TEXT NOT NULL, checksum TEXT)")
            if not self._has_checksums():
                self._add_checksums()
        self._lock = threading.Lock()

    def _has_checksums(self) -> bool:
        return "checksum" in {row[1] for row in self._database.execute("PRAGMA table_info(calls)")}

    def _add_checksums(self) -> None:
        """Give the answers of a cache from before there were checksums theirs: nobody pays twice for an answer."""
        self._database.create_function("checksum_of", 2, lambda key, reply: text_digest([key, reply]))
        self._database.execute("BEGIN IMMEDIATE")
        if not self._has_checksums():  # another process may have been first
            self._database.execute("ALTER TABLE calls ADD COLUMN checksum TEXT")
            self._database.execute("UPDATE calls SET checksum = checksum_of(key, reply)")
        self._database.execute("COMMIT")

    def get(self, key: str) -> str | None:
        """The stored answer; None if there is none that is whole."""
        with self._lock, self._errors():
            row = self._database.execute("SELECT reply, checksum FROM calls WHERE key = ?", (key,)).fetchone()
        if row is None or not isinstance(row[0], str) or row[1] != text_digest([key, row[0]]):
            return None
        return row[0]

    def put(self, key: str, request: str, reply: str) -> None:
        """Store an answer, at once."""
        with self._lock, self._errors():
            self._database.execute("INSERT OR REPLACE INTO calls (key, request, reply, finished, checksum) "
                                   "VALUES (?, ?, ?, datetime('now'), ?)",
                                   (key, request, reply, text_digest([key, reply])))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """A damaged file or a full disk, in words."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"the cache of model calls cannot be used: {self._path} ({error}); delete it or choose "
                            "another folder") from None

    def close(self) -> None:
        """Release the file."""
        self._database.close()


class ChatClient:
    """Asks one chat model. Use as a context manager."""

    def __init__(self, model: ChatModel, cache_dir: str | Path, retry: RetryPolicy | None = None,
                 sleep: Callable[[float], None] | None = None) -> None:
        self.model = model
        self.retry = retry or RetryPolicy()
        self._cache_dir = cache_dir
        self._sleep = sleep or time.sleep
        self._backend: ChatBackend | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if "_cache" in self.__dict__:
            self._cache.close()

    @cached_property
    def _cache(self) -> CallCache:
        """Made on first use: a model that cannot be asked leaves no file."""
        return CallCache(self._cache_dir)

    def check(self) -> None:
        """Fail now if the model cannot be asked at all (no key, no cache); a local one is not loaded for this.

        Raises:
            UserError: it cannot.
        """
        if self.model.provider is not Provider.LOCAL:
            self._ready_backend()
        _ = self._cache

    def ask(self, requests: Sequence[ChatRequest], options: ChatOptions,
            report: Report | None = None) -> list[ChatReply]:
        """Answers in the order of the requests; equal requests are asked once, cached ones not at all.

        Raises:
            UserError: the model cannot be used at all (no key, unknown model, refused request).
        """
        keys = [self.key(request, options) for request in requests]
        replies = {key: ChatReply(text) for key in keys if (text := self._cache.get(key)) is not None}
        open_requests = {key: request for key, request in zip(keys, requests, strict=True) if key not in replies}
        if open_requests:
            budget = _Budget(self.retry.budget)
            n_workers = 1 if self.model.provider is Provider.LOCAL else self.retry.parallel
            with ThreadPoolExecutor(n_workers) as pool:
                calls = {pool.submit(self._call, key, request, options, budget): key
                         for key, request in open_requests.items()}
                finished = as_completed(calls)
                try:
                    for call in report.progress(finished, total=len(calls), unit="call", desc=str(self.model)) \
                            if report else finished:
                        replies[calls[call]] = call.result()
                except BaseException:
                    budget.close()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return [replies[key] for key in keys]

    def key(self, request: ChatRequest, options: ChatOptions) -> str:
        """What identifies a call: the model, where it is served, the question and how it is answered."""
        return text_digest(self._identity(request, options))

    def _identity(self, request: ChatRequest, options: ChatOptions) -> dict[str, object]:
        return {"provider": self.model.provider.value, "model": self.model.name, "base_url": self.model.base_url,
                "request": asdict(request), "options": asdict(options)}

    def _call(self, key: str, request: ChatRequest, options: ChatOptions, budget: _Budget) -> ChatReply:
        """One question with its retries; an answer is stored before anything else happens."""
        error = "no attempt left in the budget"
        wait = self.retry.first_wait
        for attempt in range(self.retry.attempts):
            if not budget.take():
                break
            pause = wait
            try:
                text = self._ready_backend().complete(request, options).strip()
                if text:
                    self._cache.put(key, json.dumps(self._identity(request, options), ensure_ascii=False), text)
                    return ChatReply(text)
                error = "empty reply"
            except ChatFailure as failure:
                error = str(failure)
                if failure.permanent:
                    raise UserError(f"{self.model} refuses the request ({error})") from None
                pause = wait if failure.retry_after is None else failure.retry_after
            _log.info("%s: attempt %d failed: %s", self.model, attempt + 1, error)
            if attempt + 1 < self.retry.attempts:
                self._sleep(pause)
                wait = min(wait * 2, self.retry.longest_wait)
        return ChatReply(None, f"{error} (after {self.retry.attempts} attempts)")

    def _ready_backend(self) -> ChatBackend:
        """The provider's client, made on first use: a run that is all cached needs no key and no server."""
        with self._lock:
            if self._backend is None:
                self._backend = BACKENDS[self.model.provider](self.model, self.retry.timeout)
            return self._backend


class _Budget:
    """Attempts left for all questions together."""

    def __init__(self, n_attempts: int) -> None:
        self._left = n_attempts
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Use one attempt; False if none is left."""
        with self._lock:
            self._left -= 1
            return self._left >= 0

    def close(self) -> None:
        """No more attempts."""
        with self._lock:
            self._left = 0
