"""Servers of `benchmarks.scale` that count what is asked of them: an S3 server, PostgreSQL with a log of its statements, Redis.

    python -m benchmarks.scale_servers PORT FILE        # the S3 server (moto): one line a request, JSON

A machine without PostgreSQL has SQLite instead, whose statements nobody outside can count.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from service.embedded import free_port

_STATEMENT = re.compile(r"^(\d+\.\d+)\|([^|]*)\|LOG:  (?:statement|execute [^:]*): (.*)")
_BOUNDS = ("BEGIN", "COMMIT", "ROLLBACK")


@dataclass(frozen=True)
class Request:
    """One request to the S3 server.

    Attributes:
        kind: see `kind_of`.
        area: first folder of the name (`blobs`, `manifests`, `work`, …) and in work areas `work/payload` or `work/scratch`.
        sent, received: bytes of the bodies, as the client sees them.
    """

    at: float
    kind: str
    area: str
    sent: int
    received: int


@dataclass(frozen=True)
class Statement:
    """One statement as PostgreSQL logged it; `process` is `api`, `worker-0`, …"""

    at: float
    process: str
    verb: str


@dataclass(frozen=True)
class Servers:
    """Where they listen, and the files in which they count. `statements` is None on SQLite."""

    redis_url: str
    database_url: str | None
    s3: dict[str, str]
    requests: Path
    statements: Path | None


@contextmanager
def counting_servers(folder: Path) -> Iterator[Servers]:
    """Start all three in a folder; they end with the block."""
    import pytest  # the helpers of tests skip where a server is missing

    from tests.helpers.servers import LOCAL, Server, postgres_server, redis_server, s3_bucket, wait_until

    requests = folder / "s3-requests.jsonl"
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.scale_servers", str(port), str(requests)]
    root = Path(__file__).parents[1]
    redis, s3 = redis_server(folder), Server("s3", command, port, folder, {"PYTHONPATH": str(root)})
    started: list[Server] = []
    try:
        postgres = postgres_server()
        postgres.command = [*postgres.command, "-c", "log_statement=all", "-c", "log_line_prefix=%n|%a|"]
    except pytest.skip.Exception:
        postgres = None
    try:
        for server in (redis, s3, *([postgres] if postgres else [])):
            server.start()
            started.append(server)
        if postgres:
            wait_until(postgres.answers, "PostgreSQL answers")
        bucket = s3_bucket(f"http://{LOCAL}:{port}", "benchmark-key", "benchmark-secret")
        named = {name: str(value) for name, value in bucket.settings("audits").items()}
        log = postgres.folder / "postgres.log" if postgres else None
        yield Servers(redis.url, postgres.fresh("scale") if postgres else None, named, requests, log)
    finally:
        for server in reversed(started):
            server.stop(signal.SIGINT if server is postgres else signal.SIGTERM)


def read_requests(path: Path) -> list[Request]:
    """All requests so far."""
    return [Request(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def read_statements(path: Path | None) -> list[Statement] | None:
    """All statements so far, the bounds of transactions left out; None on SQLite."""
    if path is None:
        return None
    found = (_STATEMENT.match(line) for line in path.read_text(errors="replace").splitlines())
    all_of = (Statement(float(hit[1]), hit[2], hit[3].split(" ", 1)[0].upper()) for hit in found if hit)
    return [one for one in all_of if one.verb.rstrip(";") not in _BOUNDS]


def kind_of(method: str, path: str, query: str) -> str:
    """PUT, GET, HEAD, DELETE, LIST, or `part`: a request of a multipart upload."""
    given = parse_qs(query, keep_blank_values=True)
    if {"uploads", "uploadId", "partNumber"} & given.keys():
        return "part"
    in_bucket = "/" in path.strip("/")
    return "LIST" if method == "GET" and not in_bucket else method


def area_of(path: str) -> str:
    """See `Request.area`; the names of this benchmark begin with bucket and prefix."""
    parts = path.strip("/").split("/")[2:]
    if parts[:1] == ["work"] and len(parts) > 3:
        return f"work/{parts[3]}"
    return parts[0] if parts else "bucket"


class CountingApp:
    """A WSGI application that writes down what another is asked."""

    def __init__(self, app: Callable[..., Iterable[bytes]], path: Path) -> None:
        self._app = app
        self._file = path.open("a", buffering=1)
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        length = 0

        def started(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            nonlocal length
            length = int(next((value for name, value in headers if name.lower() == "content-length"), 0))
            return start_response(status, headers, *more)

        at, method = time.time(), environ["REQUEST_METHOD"]
        answer = self._app(environ, started)
        kind = kind_of(method, environ["PATH_INFO"], environ.get("QUERY_STRING", ""))
        area, sent = area_of(environ["PATH_INFO"]), int(environ.get("CONTENT_LENGTH") or 0)
        line = {"at": at, "kind": kind, "area": area, "sent": sent, "received": 0 if kind == "HEAD" else length}
        with self._lock:
            self._file.write(json.dumps(line) + "\n")
        return answer


def main() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    port, path = int(sys.argv[1]), Path(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    run_simple("127.0.0.1", port, CountingApp(DomainDispatcherApplication(create_backend_app), path), threaded=True)


if __name__ == "__main__":
    main()
