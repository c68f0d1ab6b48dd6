"""One connection to the service: timeouts, retries of what may be repeated, and problems turned into errors."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from safer_engine.errors import SaferError
from service import errors
from service.errors import Unreachable
from service.schemas import Problem

if TYPE_CHECKING:
    import httpx

_REPEATABLE = frozenset(("GET", "HEAD", "PUT", "DELETE"))
_PASSING = frozenset((502, 503, 504))
_LONGEST_PAUSE = 8.0
_LONGEST_WAIT_ASKED = 60.0
_LOOPBACK = frozenset(("127.0.0.1", "::1", "localhost"))
_READ_SECONDS = 60.0


@dataclass(frozen=True)
class Patience:
    """How long to go on.

    Attributes:
        attempts: of one request, the first included.
        first_pause: seconds before the second attempt; each further pause is twice as long, give or take a quarter.
    """

    attempts: int = 5
    first_pause: float = 0.25

    def pause(self, attempt: int) -> float:
        """Seconds to wait after a failed attempt, counted from 0."""
        spread: float = random.uniform(0.75, 1.25)  # noqa: S311 - no secret
        return spread * min(_LONGEST_PAUSE, self.first_pause * 2.0**attempt)


class Connection:
    """HTTP to one service.

    Args:
        transport: in place of the network (an ASGI application, for example).
    """

    def __init__(
        self,
        url: str,
        token: str,
        transport: httpx.BaseTransport | None = None,
        patience: Patience | None = None,
        read_seconds: float = _READ_SECONDS,
    ) -> None:
        import httpx

        self.url = url.rstrip("/")
        self._patience = patience or Patience()
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}", "User-Agent": "safer-audit"},
            transport=transport,
            timeout=httpx.Timeout(read_seconds, connect=5.0),
            trust_env=urlsplit(url).hostname not in _LOOPBACK,  # a proxy is not asked for this machine itself
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        repeatable: bool | None = None,
        body: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """One request, again while its error may pass and repeating does no harm.

        Args:
            body: bytes go as they are, anything else as JSON.
            repeatable: whether doing it twice is as good as once; by default GET, HEAD, PUT and DELETE are.

        Raises:
            Unreachable: nobody answers.
            SaferError: the service refused; the class is the one of the problem's code.
        """
        again = method in _REPEATABLE if repeatable is None else repeatable
        given = {name: value for name, value in (params or {}).items() if value not in (None, [], ())}
        sent: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        request = self._client.build_request(method, path, params=given, headers=dict(headers or {}), **sent)
        for attempt in range(self._patience.attempts):
            last = attempt == self._patience.attempts - 1
            error, pause = self._try(request, again)
            if not isinstance(error, SaferError):
                return error
            if pause is None or last:
                raise error
            time.sleep(max(pause, self._patience.pause(attempt)))
        raise AssertionError("unreachable")

    def _try(self, request: httpx.Request, again: bool) -> tuple[httpx.Response | SaferError, float | None]:
        """One attempt: the response, or the error and the least pause before another attempt (None: there is no point)."""
        import httpx

        try:
            response = self._client.send(request)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:  # it was never sent: repeating is harmless
            return self.unreachable(error), 0.0
        except httpx.TransportError as error:
            return self.unreachable(error), 0.0 if again else None
        except httpx.InvalidURL as error:
            return errors.Malformed(f"{self.url}: {error}"), None
        if response.status_code < 400:
            return response, None
        found = problem_of(response)
        if isinstance(found, errors.TooManyRequests) or (again and response.status_code in _PASSING):
            return found, min(_asked(response), _LONGEST_WAIT_ASKED)
        return found, None

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str] | None = None) -> Iterator[httpx.Response]:
        """A GET whose body comes piece by piece; a redirect (to a presigned address) is followed without our key.

        Raises:
            Unreachable: nobody answers, or the stream broke: what came may be kept.
            SaferError: the service refused.
        """
        import httpx

        try:
            with self._client.stream("GET", path, headers=dict(headers or {}), follow_redirects=True) as response:
                if response.status_code >= 400:
                    response.read()
                    raise problem_of(response)
                yield response
        except (httpx.TransportError, httpx.TooManyRedirects) as error:
            raise self.unreachable(error) from error

    def put_elsewhere(self, url: str, content: bytes, headers: Mapping[str, str]) -> httpx.Response:
        """PUT to a presigned address: without our key, without naming the address in errors, repeated while it may help."""
        import httpx

        for attempt in range(self._patience.attempts):
            try:
                response = httpx.put(url, content=content, headers=dict(headers), timeout=_READ_SECONDS)
            except httpx.TransportError as error:
                found: SaferError = Unreachable(f"the object store cannot be reached: {type(error).__name__}", "try again")
            else:
                if response.status_code < 400:
                    return response
                found = Unreachable(f"the object store refused a part: HTTP {response.status_code}", "try again")
                if response.status_code < 500 and response.status_code != 429:
                    raise found
            if attempt == self._patience.attempts - 1:
                raise found
            time.sleep(self._patience.pause(attempt))
        raise AssertionError("unreachable")

    def unreachable(self, error: Exception) -> Unreachable:
        """The error for a request that got no answer."""
        said = str(error) or type(error).__name__
        return Unreachable(
            f"the audit service at {self.url} cannot be reached: {said}",
            "is it running? On this machine: safer-audit up. Elsewhere: check SAFER_AUDIT_URL or the profile",
        )


def problem_of(response: httpx.Response) -> SaferError:
    """The error that a refusal carries: of the class whose code it names, with its hint and the fields that are wrong."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        kind = errors.Unavailable if response.status_code in _PASSING else RemoteError
        return kind(f"{response.url.host} answered HTTP {response.status_code} ({response.reason_phrase or 'no reason'})")
    told = [f"{item.path}: {item.message}" for item in problem.errors if item.message not in problem.detail]
    said = f"fields are wrong: {'; '.join(told)}" if told else problem.detail
    return make_error(problem.code, said, problem.hint, _asked(response))


def make_error(code: str, message: str, hint: str = "", retry_after: float = 1.0) -> SaferError:
    """An error of the class that has this code; one of its own where this version does not know the code."""
    kind = _classes().get(code)
    if kind is None:
        kind = type("RemoteError", (RemoteError,), {"code": code})
    if issubclass(kind, errors.TooManyRequests):
        return kind(message, hint, retry_after)
    return kind(message, hint)


class RemoteError(errors.ServiceError):
    """An error of the service that this version of the client has no class for."""

    code = "remote_error"


def _classes() -> dict[str, type[SaferError]]:
    found: dict[str, type[SaferError]] = {}
    pending: list[type[SaferError]] = [SaferError]
    while pending:
        kind = pending.pop()
        found.setdefault(kind.code, kind)
        if not issubclass(kind, RemoteError):
            pending.extend(kind.__subclasses__())
    return found


def _asked(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("Retry-After", "")))
    except ValueError:
        return 0.0
