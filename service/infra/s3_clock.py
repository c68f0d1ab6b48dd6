"""The clock of an S3 endpoint, which is the one that requests are signed by and ages of objects are counted from.

S3 refuses requests whose signed time is more than a quarter of an hour from its own. A machine whose clock is off further
would be locked out, and its presigned URLs would be over before they began. Each answer says the endpoint's time in its `Date`
header, a refusal too: what is learned there corrects every later signature.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from botocore.auth import AUTH_TYPE_MAPS, S3SigV4Auth, S3SigV4QueryAuth

TOLERATED_SECONDS = 60.0
"""So far apart, two clocks count as the same: an answer is heard some time after it was dated."""
_FRESH_SECONDS = 300.0
_REFUSED = 403
_TIMESTAMP = "%Y%m%dT%H%M%SZ"
_SIGNERS = {"s3v4": "safer-s3v4", "s3v4-query": "safer-s3v4-query"}
_CONTEXT = "safer_clock"
_LOG = logging.getLogger(__name__)


class EndpointClock:
    """How far an endpoint's clock is from this machine's, learned from its answers. May be used by many threads."""

    def __init__(self) -> None:
        self._offset = 0.0
        self._heard: float | None = None
        self._lock = threading.Lock()

    @property
    def fresh(self) -> bool:
        """Whether the endpoint has told its time within the last minutes."""
        return self._heard is not None and time.monotonic() - self._heard < _FRESH_SECONDS

    def now(self) -> float:
        """The endpoint's time, in seconds since the epoch, within a minute; this machine's while it has told nothing."""
        return time.time() + self._offset

    def attach(self, api: Any) -> None:
        """Let a boto3 client sign by this clock, and this clock learn from its answers."""
        AUTH_TYPE_MAPS.update({"safer-s3v4": _Signer, "safer-s3v4-query": _QuerySigner})
        api.meta.events.register_first("choose-signer.s3", _choose)
        api.meta.events.register("before-sign.s3", self._lend)
        api.meta.events.register_first("needs-retry.s3", self._heed)

    def learn(self, date: str | None) -> None:
        """Take in the `Date` of an answer that came just now; what is no date is passed over."""
        try:
            told = parsedate_to_datetime(date or "").timestamp()
        except ValueError:
            return
        offset = told - time.time()
        with self._lock:
            before, self._heard = self._offset, time.monotonic()
            self._offset = offset if abs(offset) > TOLERATED_SECONDS else 0.0
            changed = abs(self._offset - before) > TOLERATED_SECONDS
        if changed and self._offset:
            _LOG.warning(
                "the clock of this machine is %.0f s %s that of S3: requests are signed with the time of S3; set the clock",
                abs(offset), "behind" if offset > 0 else "ahead of",
            )  # fmt: skip
        elif changed:
            _LOG.info("the clocks of this machine and of S3 agree again")

    def _lend(self, request: Any, **_: object) -> None:
        request.context[_CONTEXT] = self

    def _heed(self, response: Any, request_dict: dict[str, Any], attempts: int, **_: object) -> float | None:
        """Learn from an answer; a refusal of a request that was signed at the wrong time is repeated, once, at once.

        The answer to HEAD has no body, and so no code that says why it refuses: any 403 counts.
        """
        if response is None:
            return None
        http = response[0]
        if "Age" not in http.headers:  # else a cache answered, with a date of its own past
            self.learn(http.headers.get("Date"))
        signed = request_dict["context"].get("timestamp")
        if http.status_code != _REFUSED or attempts > 1 or signed is None:
            return None
        at = datetime.strptime(signed, _TIMESTAMP).replace(tzinfo=UTC).timestamp()
        return 0.0 if abs(self.now() - at) > TOLERATED_SECONDS else None


class _Signer(S3SigV4Auth):  # type: ignore[misc]
    """Signs requests with the endpoint's time."""

    def _modify_request_before_signing(self, request: Any) -> None:
        _correct(request)
        super()._modify_request_before_signing(request)


class _QuerySigner(S3SigV4QueryAuth):  # type: ignore[misc]
    """Signs URLs with the endpoint's time."""

    def _modify_request_before_signing(self, request: Any) -> None:
        _correct(request)
        super()._modify_request_before_signing(request)


def _choose(signature_version: Any, **_: object) -> str | None:
    return _SIGNERS.get(signature_version)


def _correct(request: Any) -> None:
    """Put the endpoint's time in place of this machine's, before anything was derived from it."""
    at = datetime.fromtimestamp(0, UTC) + timedelta(seconds=request.context[_CONTEXT].now())
    request.context["timestamp"] = at.strftime(_TIMESTAMP)
