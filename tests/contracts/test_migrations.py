"""The migrated schema is the one the code describes, there and back, on every database."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, select, text

from service.errors import SchemaMismatch
from service.jobs.database import check_version, migrate, migrations, open_database, reading, writing
from service.jobs.requests import Finished
from service.jobs.tables import METADATA, jobs
from tests.helpers.databases import Database, database, settings_for


def test_the_migrated_schema_is_the_tables_of_the_code(db: Database) -> None:
    with reading(db.engine) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []


def test_there_is_one_head() -> None:
    assert len(ScriptDirectory.from_config(migrations(None)).get_heads()) == 1


def test_migrating_again_changes_nothing_and_keeps_the_data(db: Database) -> None:
    job = db.submit("pairs")
    db.store.finish(db.take(), Finished(key="k" * 64, bytes=1))
    before = db.get(job)
    migrate(db.engine)
    check_version(db.engine)
    assert db.get(job) == before


def test_going_back_and_forth_with_data_in_every_step(folder: Path, database_url: str | None) -> None:
    settings = settings_for(folder, database_url)
    with database(settings) as db:
        db.submit("prepare", "pairs", labels={"a": "b"}, callback_url="https://example.org")
        db.store.claim_key(db.take(), "k" * 64)
        revisions = [script.revision for script in ScriptDirectory.from_config(migrations(None)).walk_revisions()]
        for target in (*revisions[1:], "base"):
            with writing(db.engine) as connection:
                command.downgrade(migrations(connection), target)
        with reading(db.engine) as connection:
            assert set(inspect(connection).get_table_names()) <= {"alembic_version"}
        with pytest.raises(SchemaMismatch, match="missing"):
            check_version(db.engine)
    with database(settings) as db:
        with reading(db.engine) as connection:
            assert connection.execute(select(jobs)).first() is None
        db.run(db.submit("prepare", "pairs"))


def test_processes_that_start_together_migrate_once(folder: Path, database_url: str | None) -> None:
    settings = settings_for(folder, database_url)
    engines = [open_database(settings) for _ in range(3)]
    together = Barrier(len(engines))

    def start(engine: Engine) -> None:
        together.wait()
        migrate(engine)

    with ThreadPoolExecutor(len(engines)) as pool:
        list(pool.map(start, engines))
    for engine in engines:
        check_version(engine)
    with reading(engines[0]) as connection:
        versions = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all()
        assert versions == ScriptDirectory.from_config(migrations(None)).get_heads()
        assert sorted(inspect(connection).get_table_names()) == sorted([*METADATA.tables, "alembic_version"])
    for engine in engines:
        engine.dispose()


def test_another_schema_stops_the_start_with_what_to_type(folder: Path, database_url: str | None) -> None:
    engine = open_database(settings_for(folder, database_url))
    with pytest.raises(SchemaMismatch, match="missing.*safer-audit migrate"):
        check_version(engine)
    migrate(engine)
    with writing(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from-later'"))
    with pytest.raises(SchemaMismatch, match="newer"):
        check_version(engine)
    engine.dispose()
