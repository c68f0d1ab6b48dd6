"""Garbage collection by the service itself: once in so many hours, in a thread of its own, by whoever leads.

When it is due is in the database, as a lead that is held for that long: it holds through restarts and changes of leader.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter

from sqlalchemy import Engine

from safer_engine.errors import SaferError
from service.infra.retention import Collected, gc
from service.infra.stores import Stores
from service.jobs.store import JobStore

NAME = "collection"
_HOUR = 3600.0
_AGAIN_HOURS = 1.0
"""How soon it is tried again after a failure."""
_LOOK_SECONDS = 60.0
_LOG = logging.getLogger(__name__)


class Housekeeping:
    """Collects garbage where it is due. `look` is called by the dispatcher while it leads, and returns at once."""

    def __init__(self, stores: Stores, engine: Engine, jobs: JobStore, stopping: threading.Event) -> None:
        self._stores = stores
        self._engine = engine
        self._jobs = jobs
        self._stopping = stopping
        self._hours = stores.settings.gc_hours
        self._looked = -_LOOK_SECONDS
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a collection runs."""
        return self._thread is not None and self._thread.is_alive()

    def look(self) -> None:
        """Begin a collection in another thread if one is due. Raises Unavailable: the database is away."""
        now = time.monotonic()
        if not self._hours or self.busy or self._stopping.is_set() or now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        holder = secrets.token_hex(8)  # another one each time: a lead that runs still is not renewed
        if self._jobs.lead(NAME, holder, self._hours * _HOUR):
            self._thread = threading.Thread(target=self._collect, args=(holder,), name="collection", daemon=True)
            self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the collection that runs, which ends soon after it is to stop; what it leaves, the next one finds."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _collect(self, holder: str) -> None:
        began, done = time.monotonic(), False
        try:
            collected = gc(self._stores, self._engine, stopping=self._stopping.is_set)
            done = not self._stopping.is_set()
            _LOG.info("garbage collected in %.0f s: %s", time.monotonic() - began, _told(collected))
        except (SaferError, OSError) as error:
            _LOG.warning("garbage was not collected: %s", error.message if isinstance(error, SaferError) else error)
        finally:
            if not done:
                self._put_off(holder)

    def _put_off(self, holder: str) -> None:
        try:
            self._jobs.lead(NAME, holder, min(self._hours, _AGAIN_HOURS) * _HOUR)
        except SaferError as error:
            _LOG.warning("the next collection is in %g hours: %s", self._hours, error.message)


def _told(collected: Collected) -> str:
    counts = Counter(each.kind for each in collected.removed)
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
    return f"{kinds}, {collected.size} bytes" if kinds else "nothing was due"
