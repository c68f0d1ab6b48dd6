"""Bodies that are not held in memory: files with ranges, and events as they happen."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from service.artifact_names import StoredFile
from service.errors import TooManyRequests
from service.http.errors import problem, respond
from service.jobs.model import FINAL_JOB_STATES, EventRecord, JobState
from service.schemas import EventView

_RANGE = re.compile(r"^bytes=(?P<first>\d{0,18})-(?P<last>\d{0,18})$")
_ETAG = re.compile(r'(?:W/)?"[^"]*"')
HEARTBEAT_SECONDS = 15.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 2.0
"""Between two looks at a job: short after something happened, then longer."""
RECHECK_SECONDS = 60.0
EVENTS_AT_ONCE = 200
STREAMS_PER_KEY = 32

OpenRange = Callable[[int, int], Iterator[bytes]]
"""Bytes [start, stop) of a file."""


@dataclass(frozen=True)
class ByteRange:
    """Bytes [start, stop) of a file."""

    start: int
    stop: int


class RangeNotSatisfiable(Exception):
    """The range lies behind the end of the file."""


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """The one range that is asked for; None for the whole file, also when the header is not understood or names several.

    Raises:
        RangeNotSatisfiable: it holds no byte of the file.
    """
    match = _RANGE.match(header.strip()) if header else None
    if match is None or not (match["first"] or match["last"]):
        return None
    if not match["first"]:
        length = int(match["last"])
        if length == 0 or size == 0:
            raise RangeNotSatisfiable
        return ByteRange(max(0, size - length), size)
    start = int(match["first"])
    stop = min(int(match["last"]) + 1, size) if match["last"] else size
    if match["last"] and int(match["last"]) < start:
        return None
    if start >= size:
        raise RangeNotSatisfiable
    return ByteRange(start, stop)


def file_response(request: Request, file: StoredFile, open_range: OpenRange, headers: dict[str, str]) -> Response:
    """A file, or one range of it; its ETag is its digest, so what a client has is never sent again."""
    etag = f'"{file.digest}"'
    common = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache", **headers}
    if etag in _etags(request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=common)
    wanted = request.headers.get("range")
    condition = request.headers.get("if-range")
    try:
        found = parse_range(wanted, file.size) if condition is None or condition.strip() == etag else None
    except RangeNotSatisfiable:
        detail = problem(416, "range", f"the file has {file.size} bytes", "ask for a range within it")
        return respond(detail, {"Content-Range": f"bytes */{file.size}"})
    part = found or ByteRange(0, file.size)
    common["Content-Length"] = str(part.stop - part.start)
    if found is not None:
        common["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{file.size}"
    status = 206 if found is not None else 200
    if request.method == "HEAD" or part.start == part.stop:
        return Response(status_code=status, headers=common, media_type=file.media_type)
    return StreamingResponse(open_range(part.start, part.stop), status, common, file.media_type)


def _etags(header: str) -> list[str]:
    return [found.removeprefix("W/") for found in _ETAG.findall(header)]


def attachment(name: str) -> dict[str, str]:
    """Headers of a download: it is saved, never shown as a page of this site."""
    plain = name.rpartition("/")[2]
    shown = re.sub(r"[^A-Za-z0-9._-]", "_", plain)
    return {
        "Content-Disposition": f"attachment; filename=\"{shown}\"; filename*=UTF-8''{quote(plain, safe='')}",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }


class OpenStreams:
    """How many event streams each key has open, at most `STREAMS_PER_KEY`."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()

    def require_room(self, key_id: str) -> None:
        """Raises TooManyRequests where a key has as many open as it may."""
        with self._lock:
            if self._open[key_id] >= STREAMS_PER_KEY:
                raise TooManyRequests("too many event streams are open", "close some", 5.0)

    @contextmanager
    def one(self, key_id: str) -> Iterator[None]:
        """Count a stream while it is open."""
        with self._lock:
            self._open[key_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[key_id] -= 1
                if not self._open[key_id]:
                    del self._open[key_id]


@dataclass(frozen=True)
class Seen:
    """A job at one moment: its state (None: it is gone), the events since the last look, how far its open step is."""

    state: JobState | None
    events: tuple[EventRecord, ...]
    progress: dict[str, Any] | None


@dataclass(frozen=True)
class Watch:
    """What an event stream looks at. The functions may block: they are called in threads.

    Attributes:
        look: the job, with its events after an id; the state is read first, so that a job that has ended has told all.
        allowed: whether the key still lives.
        stopping: the service ends.
        follow: False ends the stream after what has happened so far.
    """

    look: Callable[[int], Seen]
    allowed: Callable[[], bool]
    stopping: threading.Event
    follow: bool = True


async def event_stream(watch: Watch, after: int) -> AsyncIterator[str]:
    """Server-sent events from `after` on, to a last one named `end` when the job has ended and all was told.

    In between, `progress` tells how far the open step is, whenever that has changed; it has no id, being no event that is kept.
    A comment goes out in every quiet quarter of a minute, so that proxies and clients know the stream lives. Where the
    service stops, or the key is revoked, the stream just ends: a client goes on elsewhere with its `Last-Event-ID`.
    """
    yield "retry: 2000\n\n"
    clock = asyncio.get_running_loop().time
    told = checked = clock()
    progress: dict[str, Any] | None = None
    pause = FIRST_PAUSE_SECONDS
    while not watch.stopping.is_set():
        seen = await asyncio.to_thread(watch.look, after)
        for event in seen.events:
            yield sse(event.kind, event_view(event).model_dump(mode="json"), event.id)
            after = event.id
        if not seen.events and (seen.state is None or seen.state in FINAL_JOB_STATES or not watch.follow):
            yield sse("end", {"state": seen.state})
            return
        now = clock()
        if seen.progress is not None and seen.progress != progress:
            yield sse("progress", seen.progress)
        elif not seen.events and now - told >= HEARTBEAT_SECONDS:
            yield ": still here\n\n"
            told = now
        if seen.events or seen.progress != progress:
            progress, told, pause = seen.progress, now, FIRST_PAUSE_SECONDS
        if now - checked >= RECHECK_SECONDS:
            checked = now
            if not await asyncio.to_thread(watch.allowed):
                return
        if len(seen.events) < EVENTS_AT_ONCE:
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS)


def event_view(event: EventRecord) -> EventView:
    """An event as clients see it."""
    return EventView(id=event.id, at=event.at, kind=event.kind, stage=event.stage, data=event.data)


def sse(kind: str, data: dict[str, Any], event_id: int | None = None) -> str:
    """One event on the wire; its data is one line of JSON."""
    head = f"id: {event_id}\n" if event_id is not None else ""
    return f"{head}event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
