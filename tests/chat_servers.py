"""Servers on loopback for tests of chat clients: one that speaks two protocols from a script of replies and faults."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable
from typing import Any

Reply = Callable[[http.server.BaseHTTPRequestHandler, dict[str, Any]], None]


def send(handler: http.server.BaseHTTPRequestHandler, status: int, body: Any, **headers: str) -> None:
    """Answer with JSON, or with bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def text(content: str) -> Reply:
    """A proper answer, in the protocol of the request's path."""

    def reply(handler, request):
        if handler.path.startswith("/api/"):
            send(handler, 200, {"model": request["model"], "created_at": "2026-01-01T00:00:00Z", "done": True,
                                "message": {"role": "assistant", "content": content}})  # fmt: skip
        else:
            message = {"role": "assistant", "content": content}
            send(handler, 200, {"id": "1", "object": "chat.completion", "created": 1, "model": request["model"],
                                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})  # fmt: skip

    return reply


def status(code: int, message: str = "no", **headers: str) -> Reply:
    """An error status."""
    return lambda handler, request: send(handler, code, {"error": message if handler.path.startswith("/api/")
                                                         else {"message": message}}, **headers)  # fmt: skip


def raw(content: bytes) -> Reply:
    """Bytes that claim to be JSON."""
    return lambda handler, request: send(handler, 200, content)


def truncated(handler, request) -> None:
    """Announces more than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.close_connection = True


def slow(seconds: float) -> Reply:
    """Sends a byte, then nothing for a while."""

    def reply(handler, request):
        handler.send_response(200)
        handler.send_header("Content-Length", "50")
        handler.end_headers()
        handler.wfile.write(b"{")
        handler.wfile.flush()
        time.sleep(seconds)

    return reply


def dripping(seconds: float) -> Reply:
    """Sends a byte every now and then: none is late, and the whole never comes."""

    def reply(handler, request):
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.1)

    return reply


class ScriptedServer:
    """Gives each request the next reply; the last one is repeated. Requests are kept."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.n_running = self.most_running = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    index = len(outer.requests)
                    outer.requests.append(request)
                    outer.paths.append(self.path)
                    outer.n_running += 1
                    outer.most_running = max(outer.most_running, outer.n_running)
                try:
                    outer.replies[min(index, len(outer.replies) - 1)](self, request)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # The client has given up, which the test is about.
                finally:
                    with outer._lock:
                        outer.n_running -= 1

            def log_message(self, *args):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> ScriptedServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()
