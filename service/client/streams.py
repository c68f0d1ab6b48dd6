"""Server-sent events: the stream of a job's events, taken up again where it broke."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from service.client.connection import Connection, Patience
from service.errors import TooManyRequests, Unreachable
from service.schemas import EventView

_LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Message:
    """One server-sent event. `id` is empty where it has none."""

    kind: str
    id: str
    data: str


def messages(lines: Iterable[str]) -> Iterator[Message]:
    """Server-sent events out of the lines of a stream (WHATWG HTML, § server-sent events); comments are passed over."""
    kind, last = "message", ""
    data: list[str] = []
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "":
            if data:
                yield Message(kind, last, "\n".join(data))
            kind, data = "message", []
        elif name == "data":
            data.append(value)
        elif name == "event":
            kind = value
        elif name == "id" and "\0" not in value:
            last = value


def follow(connection: Connection, path: str, after: int, patience: Patience) -> Generator[EventView]:
    """Events after `after`, as they happen, until the stream says that there will be no more.

    A broken connection is taken up again after the last event seen; attempts count only while nothing comes.

    Raises:
        Unreachable: the service stays away.
        TooManyRequests: it asks for a pause again and again.
    """
    failures = 0
    while True:
        try:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
            with connection.stream(path, headers) as response:
                for message in messages(response.iter_lines()):
                    failures = 0
                    if message.kind == "end":
                        return
                    event = _event(message)
                    if event is not None and event.id > after:
                        after = event.id
                        yield event
        except Unreachable:
            failures += 1
            if failures >= patience.attempts:
                raise
        except TooManyRequests as error:  # others share the key
            failures += 1
            if failures >= patience.attempts:
                raise
            time.sleep(min(error.retry_after, _LONGEST_PAUSE))
        time.sleep(patience.pause(failures))


def _event(message: Message) -> EventView | None:
    """The event of a message; None for kinds that this version does not know."""
    try:
        return EventView.model_validate_json(message.data)
    except (ValidationError, json.JSONDecodeError):
        return None
