"""Commits on an S3 server that ignores `If-None-Match`: a row in the database decides which is first."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from safer_engine.errors import SpecError
from service.errors import Unavailable
from service.infra.retention import gc
from service.infra.settings import Settings
from service.infra.stores import Stores
from service.jobs.clock import UtcNow
from service.jobs.database import open_database, writing
from service.jobs.tables import commits
from tests.helpers.databases import PEPPER, Database, database
from tests.helpers.fault_proxy import Fault, FaultProxy, fault_proxy
from tests.helpers.servers import S3, wait_until
from tests.helpers.store_world import KEY, World, draft, put


@pytest.fixture
def proxy(s3_moto: S3) -> Iterator[FaultProxy]:
    with fault_proxy(s3_moto.endpoint) as running:
        running.stripped = frozenset(("if-none-match",))
        yield running


@pytest.fixture
def world(folder: Path, s3_moto: S3, proxy: FaultProxy) -> World:
    return World(folder, s3_moto, s3_endpoint=proxy.url, secret_pepper=PEPPER, s3_deadline_seconds=10)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.full)])
def db(request: pytest.FixtureRequest, world: World) -> Iterator[Database]:
    url = None
    if request.param == "postgresql":
        fresh: Callable[[], str] = request.getfixturevalue("fresh_postgres")
        url = fresh()
    settings = world.settings(database_url=url)
    settings.folder.mkdir(parents=True)
    with database(settings) as found:
        yield found


def rows(db: Database) -> list[tuple[str, str]]:
    with db.engine.connect() as connection:
        return [(row.key, row.attempt) for row in connection.execute(select(commits))]


def staged(stores: Stores) -> list[str]:
    return [found.name for found in stores.space.listing("staged/")]


def test_what_decides_is_said(world: World, db: Database, s3_moto: S3) -> None:
    assert world.stores(engine=db.engine).readiness().exclusive == "sql"
    assert world.stores(engine=db.engine, s3_endpoint=s3_moto.endpoint).readiness().exclusive == "conditional-put"
    alone = world.stores()
    assert not alone.readiness().ok
    with pytest.raises(SpecError, match="If-None-Match"):
        put(alone.project("default"), {"a.bin": b"1"})
    assert not alone.project("default").has("pairs", KEY)


def test_a_server_that_cannot_be_asked_does_not_decide(world: World, db: Database, proxy: FaultProxy) -> None:
    fault = proxy.add(Fault("error", "PUT", "/probe/", times=None))
    stores = world.stores(engine=db.engine, s3_deadline_seconds=0.3)
    assert stores.readiness().exclusive == ""
    with pytest.raises(Unavailable):
        put(stores.project("default"), {"a.bin": b"1"})
    fault.times = 0
    assert stores.readiness().exclusive == "sql"


def test_of_many_commits_at_once_one_wins(world: World, db: Database) -> None:
    machines = [world.stores(f"m{number}", engine=db.engine) for number in range(3)]

    def commit(number: int) -> str:
        store = machines[number % 3].project("default")
        with store.open_work("pairs", KEY, shared=True) as work:
            with work.publish("a.bin") as path:
                path.write_bytes(str(number).encode())
            return str(store.commit("pairs", KEY, work, draft()).manifest.attempt)

    with ThreadPoolExecutor(12) as pool:
        attempts = set(pool.map(commit, range(12)))
    assert len(attempts) == 1
    assert rows(db) == [(KEY, attempts.pop())]
    assert staged(machines[0]) == []


def test_a_winner_that_dies_is_finished_by_the_next(world: World, db: Database, proxy: FaultProxy) -> None:
    fault = proxy.add(Fault("error", "PUT", "/manifests/", times=None))
    dying = world.stores("dying", engine=db.engine, s3_deadline_seconds=0.2)
    dead = proxy.add(Fault("error", "DELETE", "/staged/", times=None))
    with pytest.raises(Unavailable):
        put(dying.project("default"), {"a.bin": b"first"}, drafted=draft(by="first"))
    assert len(staged(world.stores())) == 1
    assert not world.store().has("pairs", KEY)
    fault.times = dead.times = 0
    manifest = put(world.stores("two", engine=db.engine).project("default"), {"a.bin": b"second"}, drafted=draft(by="second"))
    assert manifest.meta == {"by": "first"}
    assert world.store().read("pairs", KEY).path("a.bin").read_bytes() == b"first"


def test_a_row_of_an_artifact_that_was_removed_does_not_block(world: World, db: Database) -> None:
    store = world.stores(engine=db.engine).project("default")
    first = put(store, {"a.bin": b"1"})
    store.delete("pairs", KEY)
    second = put(store, {"a.bin": b"2"})
    assert second.attempt != first.attempt
    assert rows(db) == [(KEY, second.attempt)]


def test_a_row_without_anything_does_not_block(world: World, db: Database) -> None:
    with writing(db.engine) as connection:
        row = {"project": "default", "stage": "pairs", "key": KEY, "attempt": "f" * 32, "at": UtcNow()}
        connection.execute(insert(commits).values(row))
    manifest = put(world.stores(engine=db.engine).project("default"), {"a.bin": b"1"})
    assert rows(db) == [(KEY, manifest.attempt)]


def test_collection_forgets_the_row(world: World, db: Database) -> None:
    stores = world.stores(engine=db.engine)
    put(stores.project("default"), {"x": b"1"}, KEY, "activations")
    assert len(rows(db)) == 1
    found = gc(stores, db.engine, now=2e9)
    assert [each.name for each in found.of("artifact")] == [f"activations/{KEY}"]
    assert rows(db) == []


def _commit_slowly(world: World, settings: Settings) -> None:
    engine = open_database(settings)
    put(world.stores("killed", engine=engine).project("default"), {"a.bin": b"first"}, drafted=draft(by="killed"))


@pytest.mark.full
@pytest.mark.parametrize("path", ["/staged/", "/manifests/"])
def test_a_killed_committer_leaves_the_whole_or_nothing(world: World, db: Database, proxy: FaultProxy, path: str) -> None:
    slow = proxy.add(Fault("slow", "PUT", path, times=None, seconds=30))
    child = multiprocessing.get_context("spawn").Process(target=_commit_slowly, args=(world, db.settings))
    child.start()
    wait_until(lambda: slow.hits > 0, "the commit has begun", 60)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    slow.times = 0
    manifest = put(world.stores("two", engine=db.engine).project("default"), {"a.bin": b"second"}, drafted=draft(by="two"))
    stored = world.store().read("pairs", KEY)
    assert stored.manifest == manifest
    assert stored.path("a.bin").read_bytes() == {"killed": b"first", "two": b"second"}[manifest.meta["by"]]
    assert len(rows(db)) <= 1
