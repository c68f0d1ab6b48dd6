"""What tests share. Servers and the browser: each is started once, when a test first asks for it, and stopped at the end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import chromium
from tests.helpers.databases import memory_folder
from tests.helpers.rgw import ACCESS_KEY, SECRET_KEY, rgw_server
from tests.helpers.servers import LOCAL, S3, Postgres, Redis, moto_server, postgres_server, redis_server, s3_bucket, wait_until


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the test's own, in memory where the machine has that."""
    with memory_folder() as path:
        yield path


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """A running Redis; a test that stops it starts its own with `redis_server`."""
    server = redis_server(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis: Redis) -> str:
    """URL of the shared Redis, emptied."""
    redis.flush()
    return redis.url


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL cluster."""
    server = postgres_server()
    server.start()
    wait_until(server.answers, "PostgreSQL answers")
    yield server
    server.stop()


_NUMBERS = itertools.count()


@pytest.fixture
def fresh_postgres(postgres: Postgres) -> Callable[[], str]:
    """Makes an empty database and gives its SQLAlchemy URL."""
    return lambda: postgres.fresh(f"test{next(_NUMBERS)}")


@pytest.fixture
def postgres_url(fresh_postgres: Callable[[], str]) -> str:
    """SQLAlchemy URL of an empty database."""
    return fresh_postgres()


@pytest.fixture(scope="session")
def s3_moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A bucket on a moto server."""
    pytest.importorskip("moto.server")
    server = moto_server(tmp_path_factory.mktemp("moto"))
    server.start()
    yield s3_bucket(f"http://{LOCAL}:{server.port}", "test-access-key", "test-secret-key")
    server.stop()


@pytest.fixture(scope="session")
def s3_rgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A bucket on a Ceph gateway; for tests marked full."""
    server = rgw_server(tmp_path_factory.mktemp("rgw"))
    yield s3_bucket(server.endpoint, ACCESS_KEY, SECRET_KEY)
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium. A module's own: while Playwright's loop is open in this thread, no other test of it can run one."""
    with chromium() as started:
        yield started
