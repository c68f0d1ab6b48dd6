"""Databases for tests: SQLite in memory-backed files where the machine has them, PostgreSQL from the shared cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from sqlalchemy import Engine, update

from service.infra.settings import Settings, load_settings
from service.jobs.access import AccessStore
from service.jobs.clock import utc_after
from service.jobs.database import migrate, open_database, writing
from service.jobs.model import JobKind, JobRecord, JobState, Lease, StagePart, StageState
from service.jobs.requests import Finished, NewJob
from service.jobs.store import JobStore
from service.jobs.tables import job_labels, jobs, units

_MEMORY = Path("/dev/shm")
PEPPER = "a pepper of tests"


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in which a commit costs no disk access, where the machine has one."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None, prefix="safer-test-") as folder:
        yield Path(folder)


def new_job(*stages: str, **given: object) -> NewJob:
    """A job of these stages; a name that ends in `@gpu` goes to that queue."""
    parts = tuple(StagePart(name.partition("@")[0], name.partition("@")[2] or "cpu") for name in stages or ("prepare",))
    return replace(NewJob(JobKind.AUDIT, {"seed": 0}, parts), **given)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Database:
    """A migrated database with the project `default`, and the steps that tests take in it."""

    engine: Engine
    settings: Settings
    store: JobStore

    def submit(self, *stages: str, project: str = "default", **given: object) -> JobRecord:
        """Submit a job of these stages."""
        return self.store.submit(project, new_job(*stages, **given)).job

    def get(self, job: JobRecord) -> JobRecord:
        """The job as it is now."""
        return self.store.job(job.id)

    def take(self, queue: str = "cpu", owner: str = "worker-1") -> Lease:
        """Hand out the next unit of a queue and lease it."""
        (unit_id, *_) = self.store.ready_units(queue, 1)
        assert self.store.mark_sent(unit_id)
        lease = self.store.lease(unit_id, owner)
        assert lease is not None
        return lease

    def run_out(self, lease: Lease) -> None:
        """Let a lease's time pass."""
        self.change(units, units.c.id == lease.unit_id, lease_expires=utc_after(-1.0))

    def change(self, table: object, where: object, **values: object) -> None:
        """Set columns behind the store's back."""
        with writing(self.engine) as connection:
            connection.execute(update(table).where(where).values(**values))  # type: ignore[arg-type]

    def now_ready(self) -> None:
        """Let every pause pass."""
        self.change(units, units.c.state == "ready", ready_at=utc_after(-1.0))

    def run(self, job: JobRecord) -> JobRecord:
        """Finish all stages of the only job there is."""
        while self.get(job).state not in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED):
            queue = next(stage.queue for stage in self.store.stages(job.id) if stage.state is StageState.OPEN)
            self.store.finish(self.take(queue), Finished())
        return self.get(job)

    def backdate(self, job: JobRecord, seconds: float) -> None:
        """Make a job that much older than now."""
        self.change(jobs, jobs.c.id == job.id, created=utc_after(-seconds))
        self.change(job_labels, job_labels.c.job_id == job.id, created=self.get(job).created)


@cache
def migrated_sqlite() -> bytes:
    """A migrated SQLite file: copying it is quicker than migrating each test's."""
    with memory_folder() as folder:
        engine = open_database(settings_for(folder))
        migrate(engine)
        engine.dispose()  # the last connection to close brings the write-ahead log into the file
        return (folder / "service.db").read_bytes()


@contextmanager
def database(settings: Settings) -> Iterator[Database]:
    """The settings' database, migrated, with the project `default`."""
    file = settings.folder / "service.db"
    if settings.database_url is None and not file.exists():
        file.write_bytes(migrated_sqlite())
    engine = open_database(settings)
    try:
        migrate(engine)
        AccessStore(engine, settings).ensure_project("default")
        yield Database(engine, settings, JobStore(engine, settings))
    finally:
        engine.dispose()


def settings_for(folder: Path, url: str | None = None, **given: object) -> Settings:
    """Settings of a database: SQLite in the folder, or another by URL."""
    return load_settings(home=folder, database_url=url, secret_pepper=PEPPER, **given)
