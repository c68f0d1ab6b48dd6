"""An HTTP proxy that injects faults: errors, lost answers, delays, connections cut in the middle of a body.

It forwards requests as they are, `Host` included, so that signed requests stay valid.
"""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

LOCAL = "127.0.0.1"
_CHUNK = 1 << 16


@dataclass
class Fault:
    """What happens to requests that match.

    Attributes:
        kind: error: answered with `status`, never forwarded. lost: forwarded, but the answer is `status`. slow: answered
            after `seconds`. cut_answer: the connection breaks after `after` bytes of the answer's body. cut_request: it breaks
            after `after` bytes of the request's body, which is not forwarded.
        method, path: regular expressions; the path is with its query.
        times: how many requests; None for all.
        least: only bodies (of the request for cut_request, else of the answer) of at least so many bytes.
    """

    kind: Literal["error", "lost", "slow", "cut_answer", "cut_request"]
    method: str = ".*"
    path: str = ".*"
    times: int | None = 1
    status: int = 500
    seconds: float = 0.0
    after: int = 0
    least: int = 0
    hits: int = 0

    def matches(self, method: str, path: str, size: int) -> bool:
        """Whether it strikes; counts the strike."""
        if self.times is not None and self.hits >= self.times:
            return False
        if size < self.least or not (re.fullmatch(self.method, method) and re.search(self.path, path)):
            return False
        self.hits += 1
        return True


@dataclass
class FaultProxy:
    """A running proxy. `faults` may be changed at any time; `requests` are those that came, as `METHOD path`.

    Attributes:
        stripped: names of request headers, in small letters, that are not forwarded: a server that does not know them.
    """

    port: int
    upstream: tuple[str, int]
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    stripped: frozenset[str] = frozenset()
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{LOCAL}:{self.port}"

    def add(self, fault: Fault) -> Fault:
        """Inject a fault from now on."""
        with self.lock:
            self.faults.append(fault)
        return fault

    def strike(self, kinds: tuple[str, ...], method: str, path: str, size: int) -> Fault | None:
        """The first fault of some kinds that strikes a request."""
        with self.lock:
            return next((each for each in self.faults if each.kind in kinds and each.matches(method, path, size)), None)


@contextmanager
def fault_proxy(upstream_url: str) -> Iterator[FaultProxy]:
    """A proxy in front of an HTTP server, in threads of this process."""
    host, _, port = upstream_url.removeprefix("http://").rstrip("/").partition(":")
    proxy = FaultProxy(0, (host, int(port)))

    class Handler(_Handler):
        faulty = proxy

    server = ThreadingHTTPServer((LOCAL, 0), Handler)
    server.daemon_threads = True
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: FaultProxy
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""

    def _handle(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.faulty.requests.append(f"{self.command} {self.path}")
        cut = self.faulty.strike(("cut_request",), self.command, self.path, size)
        if cut is not None:
            self.rfile.read(min(cut.after, size))
            self.close_connection = True
            return
        body = self.rfile.read(size)
        error = self.faulty.strike(("error",), self.command, self.path, size)
        if error is not None:
            self._answer(error.status, [], b"")
            return
        status, headers, content = self._forward(body)
        slow = self.faulty.strike(("slow",), self.command, self.path, len(content))
        if slow is not None:
            time.sleep(slow.seconds)
        lost = self.faulty.strike(("lost",), self.command, self.path, len(content))
        if lost is not None:
            self._answer(lost.status, [], b"")
            return
        cut = self.faulty.strike(("cut_answer",), self.command, self.path, len(content))
        self._answer(status, headers, content, cut.after if cut else None)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.faulty.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect", *self.faulty.stripped):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        except OSError:
            return 502, [], b""
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: int | None = None) -> None:
        self.send_response_only(status)
        length = None
        for name, value in headers:
            if name.lower() == "content-length":
                length = value
            elif name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
        self.end_headers()
        try:
            self.wfile.write(content if cut is None else content[:cut])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
