"""HTTP servers in threads of this process: what stands in for a server elsewhere answers through one of these."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, Self

from tests.helpers.servers import LOCAL

_POLL_SECONDS = 0.01


class QuietHandler(BaseHTTPRequestHandler):
    """Speaks HTTP/1.1 and writes nothing to the terminal. `owner`: the server that it answers for."""

    owner: Any
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def body(self) -> bytes:
        """What the request carries."""
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Answer; the length is given unless `headers` give another, and HEAD gets no body."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


class LocalHttp:
    """Context manager: listens on a free port while it is open."""

    handler: ClassVar[type[QuietHandler]]

    def __enter__(self) -> Self:
        bound = type("Bound", (self.handler,), {"owner": self})
        self._server = ThreadingHTTPServer((LOCAL, 0), bound)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_SECONDS,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{LOCAL}:{self.port}"
