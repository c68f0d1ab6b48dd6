"""The database that a contract is held to: SQLite always, PostgreSQL in the full run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.databases import Database, database, settings_for


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.full)])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """URL of an empty database; None stands for SQLite in the folder of the settings."""
    if request.param == "sqlite":
        return None
    fresh: Callable[[], str] = request.getfixturevalue("fresh_postgres")
    return fresh()


@pytest.fixture
def db(folder: Path, database_url: str | None) -> Iterator[Database]:
    with database(settings_for(folder, database_url)) as found:
        yield found
