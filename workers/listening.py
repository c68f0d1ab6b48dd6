"""A worker that hears nothing any more, although messages for it lie in Redis, ends so that it is started again.

A connection may die in ways that no library notices: an answer that stops in the middle, a loop that waits for what will
never come. From inside, such a worker looks idle. From outside it does not: SQL has units of its queues that were handed out
while it listened and that nobody took, and their messages lie in Redis, where a worker that listens would have taken them
within milliseconds. Both must be so at two looks in a row, and for the same unit. Where other workers took all messages, the
first is wanting or the second; where Redis is away nothing is concluded, nor for some time after.

The worker ends rather than connect anew: what hangs may be the very thread that would have to do it. It has nothing in hand.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery import bootsteps

from service.errors import Unavailable
from service.infra.settings import Settings
from service.jobs.queue import Sender
from service.jobs.store import JobStore

DEAF = 75
"""Exit code of a worker that hears nothing any more (EX_TEMPFAIL of sysexits.h: to be tried again)."""
RECONNECT_SECONDS = 120.0
"""So long a worker that has lost Redis may take to listen again: Celery's pauses between attempts grow to half a minute."""
_LEAST_PAUSE = 10.0
_LOG = logging.getLogger(__name__)


class Ear:
    """What a worker hears: told of each message, and of each connection that is made or lost. Safe for threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._busy = 0
        self._closed = False
        self._listens = clock() + RECONNECT_SECONDS
        self._heard = 0.0

    @property
    def since(self) -> float | None:
        """From when on the worker has listened in vain, or should have, by its clock; None while it works."""
        with self._lock:
            return None if self._busy else max(self._listens, self._heard)

    @property
    def silence(self) -> float:
        """Seconds for which the worker has listened in vain; below 0 while it may still be connecting."""
        since = self.since
        return -1.0 if since is None else self._clock() - since

    def connected(self) -> None:
        """The worker listens from now on."""
        with self._lock:
            self._listens = self._clock()

    def disconnected(self) -> None:
        """The worker has lost Redis, and will connect again."""
        with self._lock:
            self._listens = self._clock() + RECONNECT_SECONDS

    @contextmanager
    def message(self) -> Iterator[bool]:
        """While a message is dealt with. False: the worker is about to end, the message is to be left alone."""
        with self._lock:
            self._busy += 1
            closed = self._closed
        try:
            yield not closed
        finally:
            with self._lock:
                self._busy -= 1
                self._heard = self._clock()

    def close(self, since: float) -> bool:
        """Hear no more messages; False, and nothing is changed, when one was heard after `since`, or is dealt with."""
        with self._lock:
            if self._busy or max(self._listens, self._heard) != since:
                return False
            self._closed = True
            return True


class Watch:
    """Looks now and then whether the ear is deaf.

    Attributes:
        pause: seconds between two looks, long enough that a message sent anew at the first one is surely taken at the second.
    """

    def __init__(self, settings: Settings, jobs: JobStore, sender: Sender, ear: Ear) -> None:
        self.pause = max(_LEAST_PAUSE, settings.reconcile_seconds, settings.resend_seconds)
        self._queues = settings.queues
        self._jobs = jobs
        self._sender = sender
        self._ear = ear
        self._suspected: frozenset[int] = frozenset()
        self._at: float | None = None

    def run(self, leave: Callable[[int], None] = os._exit) -> None:
        """Look for as long as the worker lives. Meant for a thread of its own."""
        while True:
            time.sleep(self.pause)
            if self.is_deaf():
                _LOG.error(
                    "this worker hears nothing any more: unit %d of its queues was sent again and again, and its message lies in "
                    "Redis; it ends with exit code %d, to be started again", min(self._suspected), DEAF,
                )  # fmt: skip
                leave(DEAF)

    def is_deaf(self) -> bool:
        """Look once. True at the second look in a row that finds a unit unheard; then the ear is closed."""
        since, before, at = self._ear.since, self._suspected, self._at
        try:
            self._suspected = self._unheard()
        except Unavailable:
            self._suspected = frozenset()
        self._at = since
        if since is None or since != at or not before & self._suspected:
            return False
        self._suspected &= before
        return self._ear.close(since)

    def _unheard(self) -> frozenset[int]:
        """Units that were sent while the worker listened, where their messages still lie in Redis. Raises Unavailable."""
        silence = self._ear.silence
        if silence < self.pause:
            return frozenset()
        found: set[int] = set()
        for queue in self._queues:
            units = self._jobs.unheard_units(queue, silence)
            if units and self._sender.queued(queue):
                found.update(units)
        return frozenset(found)


def step_of(ear: Ear) -> type[Any]:
    """A step of Celery's consumer that tells an ear when the worker listens, and when it does no longer."""

    class Hearing(bootsteps.StartStopStep):  # type: ignore[misc]
        requires = ("celery.worker.consumer:Tasks",)

        def start(self, parent: Any) -> None:
            ear.connected()

        def stop(self, parent: Any) -> None:
            ear.disconnected()

    return Hearing
