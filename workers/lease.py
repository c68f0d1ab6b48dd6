"""Holding a lease while a unit is computed, and writing down its course."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from service.errors import LeaseLost, ServiceError, Unavailable
from service.infra.settings import Settings
from service.infra.stores import OnTransfer
from service.jobs.model import Lease
from service.jobs.store import JobStore
from workers.supervisor import Reason

_PROGRESS_SECONDS = 1.0
_MOST_NOTES = 1000
_LOG = logging.getLogger(__name__)


class LeaseKeeper:
    """Renews a lease from a thread of its own until the context ends.

    A database that is away does not end the work: should another worker have taken the unit meanwhile, the first
    answer says so. Time is never compared with another machine's.

    Attributes:
        reason: why the work is to stop, once there is a reason.
    """

    def __init__(self, jobs: JobStore, lease: Lease, settings: Settings) -> None:
        self.reason: Reason | None = None
        self._jobs = jobs
        self._lease = lease
        self._seconds = settings.heartbeat_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease-{lease.unit_id}", daemon=True)

    def __enter__(self) -> LeaseKeeper:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        pause = self._seconds
        while not self._done.wait(pause) and self.reason is not Reason.LOST:
            try:
                beat = self._jobs.heartbeat(self._lease)
            except Unavailable:
                pause = min(self._seconds, 1.0)
                continue
            pause = self._seconds
            if not beat.held:
                self.reason = Reason.LOST
            elif beat.over_budget:
                self.reason = Reason.BUDGET
            elif beat.cancel:
                self.reason = Reason.CANCEL


class Course:
    """Writes down what a child tells: progress once a second, notes as events (see `supervisor.Ears`).

    Args:
        on_transfer: told of files that moved between the child and the artifact store.
        quiet: leave progress out: it is of a part that has no unit of its own.
    """

    def __init__(self, jobs: JobStore, lease: Lease, on_transfer: OnTransfer, *, quiet: bool = False) -> None:
        self.transferred = on_transfer
        self._jobs = jobs
        self._lease = lease
        self._quiet = quiet
        self._latest: tuple[float, float, str] | None = None
        self._written = 0.0
        self._notes: list[str] = []
        self._noted = 0

    def progress(self, done: float, total: float, unit: str) -> None:
        """See `Ears.progress`."""
        if self._quiet:
            return
        self._latest = (done, total, unit)
        if time.monotonic() - self._written >= _PROGRESS_SECONDS:
            self._write()

    def note(self, message: str) -> None:
        """See `Ears.note`."""
        self._noted += 1
        if self._noted <= _MOST_NOTES:
            self._notes.append(message)
            self._write()

    def log(self, level: int, logger: str, message: str) -> None:
        """See `Ears.log`."""
        logging.getLogger(logger).log(level, "%s", message)

    def close(self) -> None:
        """Write what is left."""
        self._write()

    def _write(self) -> None:
        """Write what is new; what cannot be written now stays for the next time."""
        self._written = time.monotonic()
        try:
            while self._notes:
                self._jobs.add_event(self._lease.job_id, "note", self._lease.stage, {"message": self._notes[0]})
                del self._notes[0]
            if self._latest is not None:
                self._jobs.progress(self._lease, *self._latest)
                self._latest = None
        except LeaseLost:
            self._latest = None  # the lease's keeper will say so
        except ServiceError as error:
            _LOG.info("the course of a unit waits to be written: %s", error.message)
