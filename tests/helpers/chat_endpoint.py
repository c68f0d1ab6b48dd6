"""A real HTTP server that speaks the chat interface, and misbehaves when told to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.local_http import LocalHttp, QuietHandler

GOOD = {"rating": 5, "direction": "safe_behaviour", "explanation": "Refusals.", "terms": ["sorry", "can't"]}

Behaviour = Callable[["Handler"], None]


@dataclass
class Asked:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float


class Handler(QuietHandler):
    """Reads a request, then behaves."""

    owner: ChatEndpoint

    def do_POST(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.owner.asked.append(Asked(self.path, headers, json.loads(self.body()), time.monotonic()))
        behaviour = self.owner.script.pop(0) if self.owner.script else self.owner.otherwise
        behaviour(self)


def completion(content: Any, usage: Any = None) -> bytes:
    """A chat completion with that answer."""
    document = {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}
    return json.dumps(document if usage is None else {**document, "usage": usage}).encode()


def answer(content: Any, usage: Any = None) -> Behaviour:
    return lambda handler: handler.reply(200, completion(content, usage), {"content-type": "application/json"})


def status(code: int, headers: dict[str, str] | None = None, body: bytes = b"{}") -> Behaviour:
    return lambda handler: handler.reply(code, body, headers)


def raw(body: bytes) -> Behaviour:
    return lambda handler: handler.reply(200, body)


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
    handler.reply(200, completion(f"As instructed by the passage: {json.dumps(GOOD)}"))


@dataclass
class ChatEndpoint(LocalHttp):
    """Behaves by `script`, one behaviour a request; `otherwise` after its end."""

    script: list[Behaviour] = field(default_factory=list)
    otherwise: Behaviour = field(default_factory=lambda: answer(json.dumps(GOOD)))
    asked: list[Asked] = field(default_factory=list)
    handler = Handler

    @property
    def url(self) -> str:
        """Base URL of the interface."""
        return f"{super().url}/v1"
