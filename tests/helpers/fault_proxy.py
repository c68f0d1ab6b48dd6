"""An HTTP proxy that injects faults: errors, lost answers, delays, connections cut in the middle of a body.

It forwards requests as they are, `Host` included, so that signed requests stay valid.
"""

from __future__ import annotations

import http.client
import re
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from tests.helpers.local_http import LocalHttp, QuietHandler

_SKEW_SECONDS = 900.0


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


class _Handler(QuietHandler):
    owner: FaultProxy

    def _handle(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.owner.requests.append(f"{self.command} {self.path}")
        cut = self.owner.strike(("cut_request",), self.command, self.path, size)
        if cut is not None:
            self.rfile.read(min(cut.after, size))
            self.close_connection = True
            return
        body = self.rfile.read(size)
        if self._is_skewed():
            self.owner.requests.append(f"skewed {self.command} {self.path}")
            code = b"<Error><Code>RequestTimeTooSkewed</Code></Error>"
            self._answer(403, [], b"" if self.command == "HEAD" else code)
            return
        error = self.owner.strike(("error",), self.command, self.path, size)
        if error is not None:
            self._answer(error.status, [], b"")
            return
        status, headers, content = self._forward(body)
        slow = self.owner.strike(("slow",), self.command, self.path, len(content))
        if slow is not None:
            time.sleep(slow.seconds)
        lost = self.owner.strike(("lost",), self.command, self.path, len(content))
        if lost is not None:
            self._answer(lost.status, [], b"")
            return
        cut = self.owner.strike(("cut_answer",), self.command, self.path, len(content))
        self._answer(status, headers, content, cut.after if cut else None)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _is_skewed(self) -> bool:
        signed = self.headers.get("X-Amz-Date") or parse_qs(urlsplit(self.path).query).get("X-Amz-Date", [None])[0]
        if self.owner.ahead_seconds is None or signed is None:
            return False
        at = datetime.strptime(signed, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
        return abs(time.time() + self.owner.ahead_seconds - at) > _SKEW_SECONDS

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.owner.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect", *self.owner.stripped):
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
        if self.owner.ahead_seconds is not None:
            headers = [each for each in headers if each[0].lower() != "date"]
            self.send_header("Date", formatdate(time.time() + self.owner.ahead_seconds, usegmt=True))
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


@dataclass
class FaultProxy(LocalHttp):
    """A running proxy. `faults` may be changed at any time; `requests` are those that came, as `METHOD path`.

    Attributes:
        stripped: names of request headers, in small letters, that are not forwarded: a server that does not know them.
        ahead_seconds: how far the server's clock is ahead. It dates its answers by it, and refuses, as S3 does, what was signed
            at a time a quarter of an hour from it: such requests are noted as `skewed METHOD path`. None: it looks at no clock.
    """

    upstream: tuple[str, int]
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    stripped: frozenset[str] = frozenset()
    ahead_seconds: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    handler = _Handler

    def add(self, fault: Fault) -> Fault:
        """Inject a fault from now on."""
        with self.lock:
            self.faults.append(fault)
        return fault

    def strike(self, kinds: tuple[str, ...], method: str, path: str, size: int) -> Fault | None:
        """The first fault of some kinds that strikes a request."""
        with self.lock:
            return next((each for each in self.faults if each.kind in kinds and each.matches(method, path, size)), None)


def fault_proxy(upstream_url: str) -> FaultProxy:
    """A proxy in front of an HTTP server; not open yet."""
    host, _, port = upstream_url.removeprefix("http://").rstrip("/").partition(":")
    return FaultProxy((host, int(port)))
