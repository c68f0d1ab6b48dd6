"""Event streams are taken up where they broke."""

from __future__ import annotations

import json

import pytest

from service.client.connection import Connection, Patience
from service.client.streams import Message, follow, messages
from service.errors import NotFound, TooManyRequests, Unreachable
from tests.helpers.scripted_server import Asked, Reply, ScriptedServer

QUICK = Patience(attempts=3, first_pause=0.001)
END = b'event: end\ndata: {"state": "succeeded"}\n\n'


def event(number: int) -> bytes:
    data = {"id": number, "at": "2026-01-01T00:00:00Z", "kind": "note", "stage": None, "data": {"n": number}}
    return f"id: {number}\nevent: note\ndata: {json.dumps(data)}\n\n".encode()


def test_lines_become_messages() -> None:
    lines = [": hello", "", "id: 7", "event: note", "data: a", "data:b", "", "data: c", "", "data: never finished"]
    assert list(messages(lines)) == [Message("note", "7", "a\nb"), Message("message", "7", "c")]


def test_a_stream_goes_on_after_the_last_event_seen() -> None:
    def rest(asked: Asked) -> Reply:
        after = int(asked.headers["last-event-id"])
        body = b": still here\n\n" + b"".join(event(n) for n in range(after + 1, 9)) + END
        return Reply(200, body, {"Content-Type": "text/event-stream"}, cut=len(event(1)) * 3)

    with ScriptedServer(otherwise=rest) as server:
        found = list(follow(Connection(server.url, "t"), "/events", 2, QUICK))
        assert [item.id for item in found] == [3, 4, 5, 6, 7, 8]
        assert [asked.headers["last-event-id"] for asked in server.asked][:2] == ["2", "4"]


def test_an_event_told_twice_is_shown_once() -> None:
    with ScriptedServer(otherwise=Reply(200, event(1) + event(2) + event(1) + event(3) + b"data: {}\n\n" + END)) as server:
        assert [item.id for item in follow(Connection(server.url, "t"), "/events", 0, QUICK)] == [1, 2, 3]


def test_a_service_that_stays_away() -> None:
    with ScriptedServer([Reply(200, event(1), cut=len(event(1)))], Reply(cut=-1)) as server:
        stream = follow(Connection(server.url, "t"), "/events", 0, QUICK)
        assert next(stream).id == 1
        with pytest.raises(Unreachable):
            next(stream)


def test_a_rate_limit_is_waited_for_but_not_for_ever() -> None:
    body = json.dumps({"type": "t", "title": "t", "status": 429, "detail": "slow", "code": "too_many_requests"}).encode()
    slow = Reply(429, body, {"Retry-After": "0"})
    with ScriptedServer([slow, slow], Reply(200, event(1) + END)) as server:
        assert [item.id for item in follow(Connection(server.url, "t"), "/events", 0, QUICK)] == [1]
        assert len(server.asked) == 3
    with ScriptedServer(otherwise=slow) as server:
        with pytest.raises(TooManyRequests, match="slow"):
            next(follow(Connection(server.url, "t"), "/events", 0, QUICK))
        assert len(server.asked) == QUICK.attempts


def test_a_refusal_is_not_repeated() -> None:
    body = json.dumps({"type": "t", "title": "t", "status": 404, "detail": "gone", "code": "not_found"}).encode()
    with ScriptedServer(otherwise=Reply(404, body)) as server:
        with pytest.raises(NotFound, match="gone"):
            next(follow(Connection(server.url, "t"), "/events", 0, QUICK))
        assert len(server.asked) == 1
