"""The log of a job as an artifact: its events as JSON lines, committed when it has ended.

The worker that ends a job writes it; what nobody wrote (the worker died, the job was cancelled) the dispatcher does later.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime

from sqlalchemy import Engine, select

from safer_engine.errors import SaferError, WorkBusy
from safer_engine.store import ManifestDraft, canonical_json, digest_bytes
from service.artifact_names import LOG_NAME, LOG_STAGE
from service.infra.stores import ServiceStore, Stores
from service.jobs.attachments import AttachmentStore, Reference
from service.jobs.clock import UtcNow
from service.jobs.database import reading
from service.jobs.job_store import EVENTS_AT_ONCE
from service.jobs.model import FINAL_JOB_STATES, EventRecord, JobRecord
from service.jobs.store import JobStore
from service.jobs.tables import artifact_refs, jobs

_AT_ONCE = 50
_LOG = logging.getLogger(__name__)


class JobLogs:
    """Writes the logs of jobs that have ended."""

    def __init__(self, engine: Engine, store: JobStore, stores: Stores) -> None:
        self._engine = engine
        self._store = store
        self._stores = stores
        self._attachments = AttachmentStore(engine)
        self._seen: datetime | None = None

    def write(self, job: JobRecord) -> None:
        """Commit the log of one job that has ended; doing it again changes nothing.

        Raises:
            SaferError: the database or the artifact store cannot be used now.
        """
        artifacts = self._stores.project(job.project)
        key = log_key(job)
        try:
            size = self._committed(artifacts, key, job)
        except WorkBusy:
            return  # another process writes it
        self._attachments.attach(job.project, job.id, Reference(LOG_STAGE, key), size)

    def write_missing(self) -> None:
        """Write the logs that nobody has written. What cannot be written now is tried again later."""
        for job_id, finished in self._without_log():
            try:
                self.write(self._store.job(job_id))
            except SaferError as error:
                _LOG.warning("the log of a job could not be written: %s", error.message, extra={"audit_id": job_id})
                return
            self._seen = max(self._seen or finished, finished)

    def lines(self, job: JobRecord) -> Iterator[str]:
        """The log, line by line."""
        after = 0
        while events := self._store.events(job.id, after):
            yield from (_line(event) for event in events)
            after = events[-1].id
            if len(events) < EVENTS_AT_ONCE:
                return

    def _committed(self, artifacts: ServiceStore, key: str, job: JobRecord) -> int:
        if not artifacts.has(LOG_STAGE, key):
            with artifacts.open_work(LOG_STAGE, key) as work:
                with work.publish(LOG_NAME) as path, path.open("w", encoding="utf-8") as handle:
                    handle.writelines(f"{line}\n" for line in self.lines(job))
                artifacts.commit(LOG_STAGE, key, work, ManifestDraft(1, "JobLog", {"job": job.id, "attempt": job.attempt}))
        return sum(entry.size for entry in artifacts.manifest(LOG_STAGE, key).files.values())

    def _without_log(self) -> list[tuple[str, datetime]]:
        """Jobs that have ended, oldest first, and have no log of their last end."""
        logged = (
            select(artifact_refs.c.job_id)
            .where(artifact_refs.c.job_id == jobs.c.id, artifact_refs.c.stage == LOG_STAGE)
            .where(artifact_refs.c.created >= jobs.c.finished)
            .exists()
        )
        ended = jobs.c.state.in_(FINAL_JOB_STATES) & jobs.c.deleted.is_(None) & (jobs.c.finished < UtcNow())
        query = select(jobs.c.id, jobs.c.finished).where(ended, ~logged).order_by(jobs.c.finished).limit(_AT_ONCE)
        if self._seen is not None:
            query = query.where(jobs.c.finished >= self._seen)
        with reading(self._engine) as connection:
            return [(row.id, row.finished) for row in connection.execute(query)]


def log_key(job: JobRecord) -> str:
    """Key of a job's log; each attempt has its own, which tells of all before it."""
    return digest_bytes(canonical_json({"log": job.id, "attempt": job.attempt}))


def _line(event: EventRecord) -> str:
    found = {"at": event.at.isoformat(), "event": event.kind, "stage": event.stage, **event.data}
    return json.dumps({name: value for name, value in found.items() if value is not None}, ensure_ascii=False)
