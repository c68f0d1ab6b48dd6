"""A real HTTP server that answers as told, and breaks off where told to: what clients have to live with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from tests.helpers.local_http import LocalHttp, QuietHandler


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


class _Handler(QuietHandler):
    owner: ScriptedServer

    def _any(self) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, parts.path, parse_qs(parts.query), headers, self.body())
        owner = self.owner
        owner.asked.append(asked)
        behaviour = owner.script.pop(0) if owner.script else owner.otherwise
        self._send(behaviour if isinstance(behaviour, Reply) else behaviour(asked))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _any

    def _send(self, reply: Reply) -> None:
        self.close_connection = reply.cut is not None
        if reply.cut != -1:
            headers = {"Content-Length": str(len(reply.body)), **reply.headers}
            self.reply(reply.status, reply.body if reply.cut is None else reply.body[: reply.cut], headers)


@dataclass
class ScriptedServer(LocalHttp):
    """Answers by `script`, one behaviour a request, then with `otherwise`."""

    script: list[Behaviour] = field(default_factory=list)
    otherwise: Behaviour = field(default_factory=lambda: Reply(500, b"nothing more is scripted"))
    asked: list[Asked] = field(default_factory=list)
    handler = _Handler
