"""What a request may be: bounded, readable, and not too frequent. All of it before any handler sees the request."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safer_engine.errors import SaferError
from service.errors import Malformed, TooLarge, TooManyRequests
from service.http.errors import from_error
from service.infra.settings import Settings

MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32_768
MAX_TARGET_BYTES = 8_192
BODY_SECONDS = 60.0
_PART = re.compile(r"^/v1/uploads/[^/]+/files/[^/]+/parts/[^/]+$")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_ENCODED_NUL = re.compile(rb"%00", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")


def strict_json(data: bytes) -> Any:
    """A JSON value as every part of the service can keep it.

    Raises:
        Malformed: not UTF-8, not JSON, a name given twice, nested deeper than `MAX_DEPTH`, a number that is not finite or
            beyond 64 bits, a NUL or half a surrogate pair in a text.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_not_a_number,
            parse_float=_finite,
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise Malformed(f"the body is not UTF-8 (byte {error.start})", "send JSON in UTF-8") from None
    except RecursionError:
        raise Malformed(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise Malformed(f"the body is not JSON: {error}", "send one JSON value") from None
    _walk(value, 0)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice in one object")
    return found


def _not_a_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or abs(value := int(text)) > MAX_INTEGER:
        raise ValueError("an integer is beyond 64 bits")
    return value


def _walk(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise Malformed(f"the body is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        require_text(value)
    elif isinstance(value, list):
        for item in value:
            _walk(item, depth + 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            require_text(name)
            _walk(item, depth + 1)


def require_text(value: str) -> str:
    """The text, if every part of the service can keep it. Raises Malformed for NUL and half a surrogate pair."""
    if "\0" in value or _SURROGATE.search(value):
        raise Malformed("a text holds NUL or half a surrogate pair", "remove it")
    return value


class Intake:
    """Refuses what is too large or cannot be read, and hands on bodies of known size, JSON among them checked.

    Bodies are counted as they come: a Content-Length is not believed. Parts of uploads are handed on as a stream, counted
    too; their handler sees TooLarge.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.body_limit = settings.body_limit_bytes
        self.part_limit = settings.upload_part_limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            _check_head(scope)
            if scope["method"] == "PUT" and _PART.match(scope["path"]):
                handed = _counted(receive, self.part_limit)
            else:
                handed = _replay(await self._body(scope, receive), receive)
        except SaferError as error:
            await from_error(error)(scope, receive, send)
            return
        await self.app(scope, handed, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        announced = _header(scope, b"content-length")
        if announced.isdigit() and int(announced[:20]) > self.body_limit:
            raise _too_large(self.body_limit)
        limited = _counted(receive, self.body_limit)
        chunks = []
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while (message := await limited())["type"] == "http.request":
                    chunks.append(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Malformed(f"the body did not come within {BODY_SECONDS:.0f} seconds") from None
        body = b"".join(chunks)
        if body and _is_json(_header(scope, b"content-type")):
            strict_json(body)
        return body


def _check_head(scope: Scope) -> None:
    headers = scope["headers"]
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        raise Malformed(f"more than {MAX_HEADERS} headers, or over {MAX_HEADER_BYTES} bytes of them")
    if any(_CONTROL.search(value) for _name, value in headers):
        raise Malformed("a header holds a control character")
    target = scope.get("raw_path", b"") + b"?" + scope.get("query_string", b"")
    if len(target) > MAX_TARGET_BYTES:
        raise Malformed(f"the path and query are over {MAX_TARGET_BYTES} bytes")
    if _ENCODED_NUL.search(target) or "\0" in scope["path"]:
        raise Malformed("the path or query holds NUL")
    if _header(scope, b"content-encoding") not in (b"", b"identity"):
        raise Malformed("compressed bodies are not read", "send the body as it is")


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value).strip() for found, value in scope["headers"] if found == name), b"")


def _is_json(content_type: bytes) -> bool:
    kind = content_type.split(b";")[0].strip().lower()
    return kind == b"application/json" or kind.endswith(b"+json")


def _counted(receive: Receive, limit: int) -> Receive:
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise _too_large(limit)
        return message

    return counted


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is over {limit} bytes", "large files go up in parts: POST /v1/uploads")


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


class RateLimit:
    """Token buckets by name, at most `names` of them (those longest unused are forgotten, which fills them up).

    The buckets are this process's: several API processes allow as many times the rate.
    """

    def __init__(self, per_minute: float, names: int = 10_000, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_minute / 60
        self._capacity = max(1.0, per_minute)
        self._names = names
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: str) -> None:
        """Count one request. Raises TooManyRequests where the bucket is empty."""
        with self._lock:
            now = self._clock()
            tokens, at = self._buckets.pop(name, (self._capacity, now))
            tokens = min(self._capacity, tokens + (now - at) * self._rate)
            enough = tokens >= 1
            self._buckets[name] = (tokens - 1 if enough else tokens, now)
            while len(self._buckets) > self._names:
                self._buckets.popitem(last=False)
        if not enough:
            wait = (1 - tokens) / self._rate
            raise TooManyRequests("too many requests", f"come back in {wait:.0f} s", wait)
