"""Which S3 errors may pass, how long they are borne with, and what they are called afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from safer_engine.errors import ArtifactError, SaferError, SpecError
from service.errors import Unavailable
from service.infra.object_space import ObjectMissing

T = TypeVar("T")
_PASSING_STATUSES = (409, 429)
"""409: another conditional request for the same object was under way."""
_PASSING_CODES = frozenset(("RequestTimeout", "RequestTimeTooSkewed", "SlowDown", "Throttling", "RequestLimitExceeded"))
_BROKEN = (HTTPClientError, ResponseStreamingError, IncompleteReadError, ReadTimeoutError)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


class Exists(ArtifactError):
    """A condition of a request was not met: there is an object already, or it has changed."""


class NotSupported(ArtifactError):
    """The S3 server does not know this kind of request."""


def status_of(error: ClientError) -> int:
    """HTTP status of an answer that was an error; 0 where it had none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: ClientError) -> str:
    """S3's name of the error; for an answer without a body, its status."""
    return str(error.response.get("Error", {}).get("Code", ""))


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, ClientError):
        status = status_of(error)
        return (status >= 500 and status != 501) or status in _PASSING_STATUSES or code_of(error) in _PASSING_CODES
    return isinstance(error, _BROKEN)


def named(error: Exception, what: str) -> SaferError:
    """The project's error for one of S3's. Messages hold names and codes, never a URL or a header."""
    if isinstance(error, ClientError):
        return _named_answer(status_of(error), code_of(error), what)
    if isinstance(error, NoCredentialsError):
        return SpecError("there are no credentials for S3", "set SAFER_S3_ACCESS_KEY and SAFER_S3_SECRET_KEY")
    return Unavailable(f"S3 cannot be reached for {what}: {type(error).__name__}", "see whether the S3 server is well")


def _named_answer(status: int, code: str, what: str) -> SaferError:
    error: SaferError = Unavailable(f"S3 answers {code or status} for {what}", "see whether the S3 server is well")
    if code == "NoSuchBucket":
        error = SpecError("the bucket of SAFER_STORE_URL does not exist", "make it, or name another")
    elif status == 404:
        error = ObjectMissing(f"{what} is not in the store")
    elif status == 412:
        error = Exists(f"{what} is there already, or has changed")
    elif status == 416:
        error = ArtifactError(f"{what} in the store is damaged: it is too short", "have it computed or uploaded again")
    elif status == 501 or code in ("NotImplemented", "InvalidArgument"):
        error = NotSupported(f"the S3 server does not know the request for {what}: {code}")
    elif 400 <= status < 500:
        error = SpecError(
            f"S3 refuses {what}: {code}", "check SAFER_S3_ACCESS_KEY, its rights on the bucket, and SAFER_S3_REGION"
        )
    return error


class Patience:
    """How much time may be lost to failed requests for one object, all its parts together."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._lock = threading.Lock()

    def bear(self, work: Callable[[], T], what: str) -> T:
        """Do the work, again while its error may pass and patience lasts. Raises SaferError."""
        failures = 0
        while True:
            began = time.monotonic()
            try:
                return work()
            except (ClientError, BotoCoreError) as error:
                self.wait(error, began, failures, what)
            failures += 1

    def wait(self, error: ClientError | BotoCoreError, began: float, failures: int, what: str) -> None:
        """Pause after a failure. Raises SaferError when it will not pass, or patience is at its end.

        Args:
            began: when what failed was begun, by `time.monotonic`.
            failures: how many there were before this one.
        """
        pause = min(_FIRST_PAUSE * 2**failures, _LONGEST_PAUSE)
        if not may_pass(error) or not self._spend(time.monotonic() - began + pause):
            raise named(error, what) from error
        time.sleep(pause)

    def _spend(self, seconds: float) -> bool:
        with self._lock:
            self._left -= seconds
            return self._left > 0
