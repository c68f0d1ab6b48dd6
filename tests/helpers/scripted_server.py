"""A real HTTP server that answers as told, and breaks off where told to: what clients have to live with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Asked:
    """One request as it came. Header names are in lower case."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """One answer. `cut`: the connection closes after so many bytes of the body; -1: before any answer."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


Behaviour = Reply | Callable[[Asked], Reply]


@dataclass
class ScriptedServer:
    """Answers by `script`, one behaviour a request, then with `otherwise`."""

    script: list[Behaviour] = field(default_factory=list)
    otherwise: Behaviour = field(default_factory=lambda: Reply(500, b"nothing more is scripted"))
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> ScriptedServer:
        scripted = self

        class Bound(_Handler):
            owner = scripted

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
        return f"http://127.0.0.1:{self._server.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    owner: ScriptedServer
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, parts.path, parse_qs(parts.query), headers, body)
        owner = self.owner
        owner.asked.append(asked)
        behaviour = owner.script.pop(0) if owner.script else owner.otherwise
        reply = behaviour if isinstance(behaviour, Reply) else behaviour(asked)
        self._send(reply)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _any

    def _send(self, reply: Reply) -> None:
        self.close_connection = reply.cut is not None
        if reply.cut == -1:
            return
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body if reply.cut is None else reply.body[: reply.cut])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - named by the base class
        """Nothing on the terminal."""
