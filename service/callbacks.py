"""Telling those who asked that a job has ended: a POST with ids and states, never with text of a dataset.

Several processes may run this: a callback is taken by compare-and-set. It may arrive more than once; receivers go by `job`
and `attempt`.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from service.errors import SourceNotAllowed, Unavailable
from service.infra.settings import Settings
from service.jobs.callbacks import CallbackStore, OwedCallback
from service.jobs.model import JobRecord
from service.outbound import Outbound
from service.signing import signer

_POLL_SECONDS = 2.0
_LOG = logging.getLogger(__name__)


class Callbacks:
    """Sends the callbacks that are owed."""

    def __init__(self, store: CallbackStore, outbound: Outbound, settings: Settings) -> None:
        self._store = store
        self._outbound = outbound
        self._settings = settings

    def run(self, stop: threading.Event) -> None:
        """Send until told to stop."""
        while not stop.is_set():
            try:
                sent = self.step(stop)
            except Unavailable as error:
                _LOG.warning("callbacks wait: %s", error.message)
                sent = 0
            if not sent:
                stop.wait(_POLL_SECONDS)

    def step(self, stop: threading.Event | None = None) -> int:
        """Send what is due now, or until told to stop; how many were due. Raises Unavailable: the database is away."""
        due = self._store.take()
        for owed in due:
            if stop is not None and stop.is_set():
                break  # due again after the pause
            self._send(owed)
        return len(due)

    def _send(self, owed: OwedCallback) -> None:
        """One attempt. An answer of 2xx settles it for good, and so does an address that is not allowed."""
        job = owed.job
        assert job.callback_url is not None, job.id
        sign = signer(self._settings.callback_secret, f"{job.id}-{job.attempt}", owed.at)  # sent again, it has the same id
        try:
            status = self._outbound.post(job.callback_url, callback_document(job, self._settings.public_url), sign)
        except SourceNotAllowed:
            _LOG.warning("a callback's address is not allowed", extra={"audit_id": job.id})
            self._store.settle(job, delivered=False)
            return
        except Unavailable:
            _LOG.info("a callback was not answered", extra={"audit_id": job.id})
            return
        if 200 <= status < 300:
            self._store.settle(job, delivered=True)
        else:
            _LOG.info("a callback was answered with %d", status, extra={"audit_id": job.id})


def callback_document(job: JobRecord, public_url: str | None) -> dict[str, Any]:
    """What is sent. Of an error only the code: its message may quote what the job was given."""
    return {
        "job": job.id,
        "attempt": job.attempt,
        "kind": job.kind,
        "state": job.state,
        "labels": job.labels,
        "error": job.error.code if job.error else None,
        "verdict": (job.verdict or {}).get("outcome"),
        "finished": job.finished.isoformat() if job.finished else None,
        "url": public_address(public_url, f"/v1/audits/{job.id}"),
    }


def public_address(public_url: str | None, path: str) -> str:
    """What clients call a path of the API; the path alone where the service does not know its own name."""
    return f"{public_url.rstrip('/')}{path}" if public_url else path
