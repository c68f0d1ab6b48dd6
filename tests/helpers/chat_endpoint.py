"""A real HTTP server that speaks the chat interface, and misbehaves when told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

GOOD = {"rating": 5, "direction": "safe_behaviour", "explanation": "Refusals.", "terms": ["sorry", "can't"]}

Behaviour = Callable[["Handler"], None]


@dataclass
class Asked:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float


@dataclass
class ChatEndpoint:
    """Behaves by `script`, one behaviour a request; `otherwise` after its end."""

    script: list[Behaviour] = field(default_factory=list)
    otherwise: Behaviour | None = None
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> ChatEndpoint:
        endpoint = self

        class Bound(Handler):
            def behaviour(self) -> Behaviour:
                return endpoint.script.pop(0) if endpoint.script else endpoint.otherwise or answer(json.dumps(GOOD))

            def note(self, asked: Asked) -> None:
                endpoint.asked.append(asked)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """Reads a request, then behaves."""

    protocol_version = "HTTP/1.1"

    def behaviour(self) -> Behaviour:
        raise NotImplementedError

    def note(self, asked: Asked) -> None:
        raise NotImplementedError

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.note(Asked(self.path, headers, json.loads(raw), time.monotonic()))
        self.behaviour()(self)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def completion(content: Any, usage: Any = None) -> bytes:
    """A chat completion with that answer."""
    document = {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}
    return json.dumps(document if usage is None else {**document, "usage": usage}).encode()


def answer(content: Any, usage: Any = None) -> Behaviour:
    return lambda handler: handler.send(200, completion(content, usage), {"content-type": "application/json"})


def status(code: int, headers: dict[str, str] | None = None, body: bytes = b"{}") -> Behaviour:
    return lambda handler: handler.send(code, body, headers)


def raw(body: bytes) -> Behaviour:
    return lambda handler: handler.send(200, body)


def hang_up(handler: Handler) -> None:
    """Close the connection without a word."""
    handler.close_connection = True
    handler.connection.close()


def hang_up_midway(handler: Handler) -> None:
    """Promise more than is sent."""
    handler.send_response(200)
    handler.send_header("content-length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.close_connection = True


def silent(seconds: float) -> Behaviour:
    return lambda handler: time.sleep(seconds)


def drip(seconds: float) -> Behaviour:
    """A byte at a time, so that no single read times out."""

    def behave(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "100000")
        handler.end_headers()
        until = time.monotonic() + seconds
        try:
            while time.monotonic() < until:
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.02)
        except OSError:
            pass
        handler.close_connection = True

    return behave


def echo_injection(handler: Handler) -> None:
    """Do as a hostile passage says: prose round the wanted object."""
    handler.send(200, completion(f"As instructed by the passage: {json.dumps(GOOD)}"))
