"""Callbacks that are owed: a job that has ended, its URL, and when to try (again)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine, select, update

from service.jobs import moves
from service.jobs.clock import UtcNow, utc_after
from service.jobs.database import reading, writing
from service.jobs.model import JobRecord
from service.jobs.records import job_of
from service.jobs.tables import jobs

MAX_ATTEMPTS = 8
_FIRST_PAUSE_SECONDS = 15.0


@dataclass(frozen=True)
class OwedCallback:
    """A callback to send now. `at`: when that was decided, by the database's clock."""

    job: JobRecord
    at: datetime


class CallbackStore:
    """Callbacks that are owed. Every method is one or more transactions and may raise Unavailable."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def take(self, limit: int = 20) -> tuple[OwedCallback, ...]:
        """Ended jobs whose callback is due now.

        Each is due again after a pause that doubles, unless `settle` says how it went; after `MAX_ATTEMPTS` it is given up.
        A callback may therefore arrive more than once, never not at all while its receiver can be reached.
        """
        due = (jobs.c.callback_state == "pending") & (jobs.c.callback_at <= UtcNow())
        with reading(self._engine) as connection:
            found = connection.execute(select(jobs.c.id).where(due).order_by(jobs.c.callback_at).limit(limit)).scalars().all()
        return tuple(owed for job_id in found if (owed := self._take(job_id)) is not None)

    def _take(self, job_id: str) -> OwedCallback | None:
        with writing(self._engine) as connection:
            job = moves.lock_job(connection, job_id)
            due = (jobs.c.id == job_id) & (jobs.c.callback_state == "pending") & (jobs.c.callback_at <= UtcNow())
            if job is None or connection.execute(select(jobs.c.id).where(due)).first() is None:
                return None
            attempts = job["callback_attempts"] + 1
            state = "pending" if attempts < MAX_ATTEMPTS else "failed"
            again = utc_after(_FIRST_PAUSE_SECONDS * 2.0 ** (attempts - 1))
            values = {"callback_state": state, "callback_attempts": attempts, "callback_at": again}
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))
            at: datetime = connection.execute(select(UtcNow())).scalar_one()
            return OwedCallback(job_of(job), at)

    def settle(self, job: JobRecord, *, delivered: bool) -> None:
        """The callback of this attempt of the job arrived, or never will; a job that was tried again since owes its own."""
        same = (jobs.c.id == job.id) & (jobs.c.attempt == job.attempt) & jobs.c.callback_state.is_not(None)
        with writing(self._engine) as connection:
            moves.lock_job(connection, job.id)
            connection.execute(update(jobs).where(same).values(callback_state="delivered" if delivered else "failed"))
