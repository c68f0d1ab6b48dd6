"""Opening a database: what is refused, what SQLite promises, what an outage looks like."""

from __future__ import annotations

import signal
import sqlite3
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar

import pytest
from sqlalchemy import literal, select, text
from sqlalchemy.exc import OperationalError, StatementError

from safer_engine.errors import SpecError
from service.errors import Unavailable
from service.infra.settings import load_settings
from service.jobs import database as module
from service.jobs.clock import UtcDateTime, UtcNow, utc_after
from service.jobs.database import file_system, open_database, reading, writing
from service.jobs.ids import new_id
from service.jobs.model import JobState
from service.jobs.requests import Finished, Reconciled
from service.jobs.store import JobStore
from service.jobs.tables import audit_log
from tests.helpers.databases import database, settings_for
from tests.helpers.servers import postgres_server, wait_until

MOUNTS = """\
/dev/root / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
tmpfs /home/me/local tmpfs rw 0 0
server:/x /mnt/with\\040space cifs rw 0 0
broken
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/var/x.db", "ext4"), ("/home/me/x.db", "nfs4"), ("/home/me/local/x.db", "tmpfs"), ("/mnt/with space/x.db", "cifs"),
     ("/homestead/x.db", "ext4")],
)  # fmt: skip
def test_the_file_system_of_a_path_is_that_of_its_nearest_mount(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS) == kind


class Contended(sqlite3.Connection):
    """A connection whose change to write-ahead logging meets another's, which SQLite refuses without waiting."""

    refusals: ClassVar = [sqlite3.SQLITE_BUSY, sqlite3.SQLITE_BUSY]

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        if "journal_mode" in sql and self.refusals:
            error = sqlite3.OperationalError("refused")
            error.sqlite_errorcode = self.refusals.pop()
            raise error
        return super().execute(sql, parameters)


def test_processes_that_open_a_new_file_together_wait_for_each_other(tmp_path: Path) -> None:
    opened: Any = sqlite3.connect(tmp_path / "new.db", factory=Contended)
    with closing(opened) as connection:
        module._write_ahead(connection)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.refusals == []
        connection.refusals.append(sqlite3.SQLITE_READONLY)
        with pytest.raises(sqlite3.OperationalError, match="refused"):
            module._write_ahead(connection)


def test_sqlite_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"server:/x {tmp_path} nfs4 rw 0 0\n")
    monkeypatch.setattr(module, "_MOUNTS", mounts)
    with pytest.raises(SpecError, match="network file system.*nfs4.*SAFER_DATABASE_URL"):
        open_database(load_settings(home=tmp_path))
    assert not (tmp_path / "service.db").exists()


@pytest.mark.parametrize("url", ["mysql://x/y", "nonsense", "sqlite://", "sqlite:///:memory:", "oracle+none://x"])
def test_other_databases_are_refused_without_naming_their_secrets(tmp_path: Path, url: str) -> None:
    with pytest.raises(SpecError):
        open_database(load_settings(home=tmp_path, database_url=url))
    with pytest.raises(SpecError) as caught:
        open_database(load_settings(home=tmp_path, database_url="mysql://user:canary@host/db"))
    assert "canary" not in str(caught.value)


def test_sqlite_keeps_its_promises(tmp_path: Path) -> None:
    engine = open_database(load_settings(home=tmp_path))
    with reading(engine) as connection:
        found = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    assert (tmp_path / "service.db").stat().st_mode & 0o777 == 0o600
    engine.dispose()


def test_writers_wait_for_each_other_and_readers_do_not(tmp_path: Path) -> None:
    with database(settings_for(tmp_path)) as db:
        began, go_on, order = threading.Event(), threading.Event(), []

        def hold() -> None:
            with writing(db.engine) as connection:
                connection.execute(text("UPDATE projects SET max_running = 77"))
                began.set()
                go_on.wait(10)
                order.append("first")

        def second() -> None:
            with writing(db.engine) as connection:
                order.append("second")
                connection.execute(text("UPDATE projects SET max_running = max_running + 1"))

        threads = [threading.Thread(target=hold), threading.Thread(target=second)]
        threads[0].start()
        assert began.wait(10)
        threads[1].start()
        with reading(db.engine) as connection:
            assert connection.execute(text("SELECT max_running FROM projects")).scalar() == db.settings.default_max_running
        go_on.set()
        for thread in threads:
            thread.join(20)
        assert order == ["first", "second"]
        with reading(db.engine) as connection:
            assert connection.execute(text("SELECT max_running FROM projects")).scalar() == 78


def test_an_error_takes_the_whole_transaction_back(tmp_path: Path) -> None:
    with database(settings_for(tmp_path)) as db:
        with pytest.raises(RuntimeError, match="on purpose"), writing(db.engine) as connection:
            connection.execute(text("UPDATE projects SET max_running = 77"))
            raise RuntimeError("on purpose")
        with reading(db.engine) as connection:
            assert connection.execute(text("SELECT max_running FROM projects")).scalar() == db.settings.default_max_running


def test_a_database_that_cannot_be_used_is_unavailable(tmp_path: Path) -> None:
    away = open_database(settings_for(tmp_path, "postgresql+psycopg://user:canary@127.0.0.1:1/none"))
    with pytest.raises(Unavailable) as caught, reading(away) as connection:
        connection.execute(text("SELECT 1"))
    assert "canary" not in str(caught.value)
    assert caught.value.retryable
    assert JobStore(away, settings_for(tmp_path)).facts() is None
    folder = tmp_path / "service.db"
    broken = open_database(settings_for(tmp_path))
    folder.unlink()
    folder.mkdir()
    with pytest.raises(Unavailable, match="SQLITE_CANTOPEN"), writing(broken):
        pass


def test_a_wrong_statement_is_not_called_an_outage(tmp_path: Path) -> None:
    with database(settings_for(tmp_path)) as db, pytest.raises(OperationalError, match="no such table"):
        with reading(db.engine) as connection:
            connection.execute(text("SELECT 1 FROM absent"))


def test_times_are_the_databases_and_aware(tmp_path: Path) -> None:
    with database(settings_for(tmp_path)) as db, reading(db.engine) as connection:
        now, later, before = connection.execute(select(UtcNow(), utc_after(90.5), utc_after(-0.25))).one()
        assert now.tzinfo is not None
        assert abs(now - datetime.now(UTC)) < timedelta(minutes=1)
        assert timedelta(seconds=90) < later - now < timedelta(seconds=92)
        assert now - before <= timedelta(seconds=0.3)
        assert connection.execute(select(utc_after(-0.001) < UtcNow())).scalar()
        at = datetime(2026, 1, 2, 3, 4, 5, 6000, timezone(timedelta(hours=2)))
        assert connection.execute(select(literal(at, UtcDateTime()))).scalar() == at


def test_a_naive_time_is_refused(tmp_path: Path) -> None:
    with database(settings_for(tmp_path)) as db, pytest.raises(StatementError, match="without a time zone"):
        with reading(db.engine) as connection:
            connection.execute(select(audit_log).where(audit_log.c.at > datetime(2026, 1, 1)))


@pytest.mark.parametrize("hours", [-1.0, 1.0])
def test_a_process_whose_clock_is_off_leases_by_the_databases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: float
) -> None:
    real = time.time
    with database(settings_for(tmp_path)) as db:
        monkeypatch.setattr(time, "time", lambda: real() + 3600.0 * hours)
        monkeypatch.setattr(time, "time_ns", lambda: int((real() + 3600.0 * hours) * 1e9))
        job = db.submit()
        lease = db.take()
        monkeypatch.undo()
        assert db.store.reconcile() == Reconciled()
        (unit,) = db.store.units(job.id)
        assert unit.lease_expires is not None
        left = unit.lease_expires - datetime.now(UTC)
        assert timedelta(0) < left <= timedelta(seconds=db.settings.lease_seconds + 0.01)
        assert abs(db.get(job).created - datetime.now(UTC)) < timedelta(minutes=1)
        assert db.store.heartbeat(lease).held


@pytest.mark.full
def test_the_store_goes_on_after_postgresql_was_restarted(tmp_path: Path) -> None:
    server = postgres_server()
    server.start()
    try:
        wait_until(server.answers, "PostgreSQL answers")
        with database(settings_for(tmp_path, server.fresh("jobs"))) as db:
            job = db.submit("prepare", "pairs")
            lease = db.take()
            server.stop(signal.SIGINT)
            for ask in (lambda: db.store.heartbeat(lease), db.submit, db.store.reconcile):
                with pytest.raises(Unavailable):
                    ask()
            assert db.store.facts() is None
            server.start()
            wait_until(server.answers, "PostgreSQL answers")
            assert db.store.heartbeat(lease).held
            db.store.finish(lease, Finished())
            assert db.run(job).state is JobState.SUCCEEDED
    finally:
        server.stop()


def test_ids_sort_by_time_and_differ() -> None:
    ids = [new_id() for _ in range(2000)]
    assert len(set(ids)) == 2000
    assert {len(one) for one in ids} == {26}
    assert [one[:10] for one in ids] == sorted(one[:10] for one in ids)
    assert set("".join(ids)) <= set("0123456789ABCDEFGHJKMNPQRSTVWXYZ")
