"""Opening the database: SQLite in a local file by default, PostgreSQL by URL."""

from __future__ import annotations

import importlib.resources
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from safer_engine.errors import SpecError
from service.errors import SchemaMismatch, Unavailable
from service.infra.settings import Settings

_BUSY_SECONDS = 30
_BUSY_PAUSE_SECONDS = 0.02
_POOL: dict[str, Any] = {"pool_timeout": _BUSY_SECONDS, "hide_parameters": True}
"""Parameters may quote a dataset, in a reviewer's note or an error: they stay out of error messages, and so out of logs."""
_READ_ONLY = "safer_read_only"
_MIGRATION_LOCK = 0x5AFE12
_NETWORK_FILE_SYSTEMS = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs", "gpfs", "lustre", "nfs"),
    *("nfs4", "smb3", "smbfs"),
)
_SQLITE_PASSES = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
_MOUNTS = Path("/proc/self/mounts")


def open_database(settings: Settings) -> Engine:
    """The database of the settings, not yet looked at.

    SQLite: write-ahead log, every commit on disk, foreign keys, and one writer at a time that others wait for.

    Raises:
        SpecError: the URL is not one of SQLite or PostgreSQL, or its file lies on a network file system.
    """
    try:
        url = make_url(settings.database)
        backend = url.get_backend_name()
        if backend == "sqlite":
            return _open_sqlite(url)
        if backend == "postgresql":
            return _open_postgresql(url)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise SpecError("SAFER_DATABASE_URL cannot be used", "give postgresql+psycopg://user@host/name, or nothing") from error
    raise SpecError(f"SAFER_DATABASE_URL names {backend}", "SQLite and PostgreSQL are understood")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One transaction that may write. Raises Unavailable where the database cannot be reached or is too busy."""
    with _reachable(), engine.begin() as connection:
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One transaction that only reads; on SQLite it waits for no writer. Raises Unavailable as `writing` does."""
    with _reachable(), engine.connect() as connection, connection.execution_options(**{_READ_ONLY: True}).begin():
        yield connection


def migrate(engine: Engine) -> None:
    """Bring the schema to this program's; several processes may try at once. Raises Unavailable."""
    with writing(engine) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        command.upgrade(migrations(connection), "head")


def check_version(engine: Engine) -> None:
    """Refuse a schema that is not this program's. Raises SchemaMismatch with the command to type, Unavailable."""
    wanted = ScriptDirectory.from_config(migrations(None)).get_current_head()
    with reading(engine) as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    if found == wanted:
        return
    known = {script.revision for script in ScriptDirectory.from_config(migrations(None)).walk_revisions()}
    if found is not None and found not in known:
        raise SchemaMismatch(f"the database's schema {found} is of a newer version", "run the version that migrated it")
    raise SchemaMismatch(f"the database's schema is {found or 'missing'}, not {wanted}", "run `safer-audit migrate`")


def migrations(connection: Connection | None) -> Config:
    """Alembic's configuration, made here: nothing is read from a file."""
    config = Config()
    folder = importlib.resources.files("service.jobs") / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def file_system(path: Path, mounts: str) -> str | None:
    """Type of the file system that holds a path, by the text of `/proc/self/mounts`; None where that does not tell."""
    found: tuple[int, str] | None = None
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        if path.is_relative_to(point) and (found is None or len(point) >= found[0]):
            found = (len(point), fields[2])
    return found[1] if found else None


def _open_sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise SpecError("a database in memory is lost with its process", "give SQLite the path of a file")
    path = Path(url.database).expanduser().resolve()
    kind = file_system(path, _MOUNTS.read_text(errors="replace")) if _MOUNTS.exists() else None
    if kind in _NETWORK_FILE_SYSTEMS:
        raise SpecError(f"{path} is on a network file system ({kind}), where SQLite loses data", "set SAFER_DATABASE_URL")
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    engine = create_engine(url.set(database=str(path)), connect_args={"timeout": _BUSY_SECONDS}, **_POOL)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver's guess
    for pragma in (f"busy_timeout={_BUSY_SECONDS * 1000}", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
    _write_ahead(connection)


def _write_ahead(connection: DBAPIConnection) -> None:
    # SQLite does not wait its busy timeout for the exclusive lock that this change takes once: of processes that open a new
    # file together, all but one would fail.
    end = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(_BUSY_PAUSE_SECONDS)


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later would fail at once when another wrote in between; one that takes the
    # write lock at its begin waits for its turn instead.
    reads = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _open_postgresql(url: URL) -> Engine:
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    given = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
    engine = create_engine(url, connect_args=given, pool_pre_ping=True, pool_size=10, max_overflow=20, **_POOL)
    event.listen(engine, "connect", _prepare_postgresql)
    return engine


def _prepare_postgresql(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # A process that is stopped within a transaction must not keep its locks from everybody else.
    cursor = connection.cursor()
    cursor.execute(f"SET idle_in_transaction_session_timeout = '{_BUSY_SECONDS}s'")
    cursor.execute(f"SET lock_timeout = '{_BUSY_SECONDS}s'")
    cursor.execute("SET TIME ZONE 'UTC'")
    cursor.close()
    connection.commit()


_AWAY_HINT = "try again shortly; operators: does the database run, and does SAFER_DATABASE_URL name it?"


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise Unavailable("every connection to the database is in use", "try again shortly") from error
    except DBAPIError as error:
        if not _passes(error):
            raise
        cause = getattr(error.orig, "sqlite_errorname", type(error.orig).__name__)
        hint = "free disk space where the database is" if cause == "SQLITE_FULL" else _AWAY_HINT
        raise Unavailable(f"the database cannot be used now ({cause})", hint) from error


def _passes(error: DBAPIError) -> bool:
    """Whether it is the database's state, not the statement, that is wrong."""
    if error.connection_invalidated or isinstance(error, InterfaceError):
        return True
    code = getattr(error.orig, "sqlite_errorcode", None)
    return isinstance(error, OperationalError) and (code is None or code & 0xFF in _SQLITE_PASSES)
