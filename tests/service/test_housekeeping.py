"""The service collects garbage by itself: when it is due, beside the dispatcher, whatever happens to it."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Iterator

import pytest

from service.housekeeping import NAME, Housekeeping
from service.infra.local_service_store import store_folder
from service.infra.stores import Stores
from service.jobs.clock import utc_after
from service.jobs.tables import leaders
from tests.helpers.databases import Database, memory_folder
from tests.helpers.store_world import World


@pytest.fixture
def world() -> Iterator[World]:
    with memory_folder() as path:
        yield World(path, None, secret_pepper="a pepper of tests, long enough", retention_days=1)


def leave_garbage(stores: Stores) -> None:
    with stores.project("default").open_work("sae", "a" * 64) as work, work.publish("state", scratch=True) as path:
        path.write_bytes(b"12")
    area = store_folder(stores.settings) / "work" / "default" / f"sae-{'a' * 64}"
    for path in (area, *area.rglob("*")):
        os.utime(path, (0, 0))


def areas(stores: Stores) -> list[str]:
    return [each.stage for each in stores.project("default").work_areas()]


def looked(stores: Stores, db: Database, stopping: threading.Event | None = None) -> Housekeeping:
    found = Housekeeping(stores, db.engine, db.store, stopping or threading.Event())
    found.look()
    found.join(20)
    return found


def test_it_is_done_once_in_so_many_hours_whoever_leads(
    stores: Stores, db: Database, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    leave_garbage(stores)
    with caplog.at_level(logging.INFO, "service.housekeeping"):
        looked(stores, db)
    assert areas(stores) == []
    assert "1 work, 2 bytes" in caplog.text
    leave_garbage(stores)
    looked(stores, db)
    assert areas(stores) == ["sae"]
    db.change(leaders, leaders.c.name == NAME, expires=utc_after(-1.0))
    looked(stores, db)
    assert areas(stores) == []


def test_zero_hours_turn_it_off(world: World, stores: Stores, db: Database) -> None:
    leave_garbage(stores)
    looked(world.stores(engine=db.engine, gc_hours=0), db)
    assert areas(stores) == ["sae"]


def test_what_fails_is_logged_and_tried_again_soon(stores: Stores, db: Database, caplog: pytest.LogCaptureFixture) -> None:
    leave_garbage(stores)
    root = store_folder(stores.settings)
    (root / "uploads").mkdir()
    (root / "uploads" / "no project").mkdir()
    looked(stores, db)
    assert "garbage was not collected" in caplog.text
    assert not db.store.lead(NAME, "another", 1.0)
    (root / "uploads" / "no project").rmdir()
    caplog.clear()
    db.change(leaders, (leaders.c.name == NAME) & (leaders.c.expires < utc_after(2 * 3600.0)), expires=utc_after(-1.0))
    looked(stores, db)
    assert areas(stores) == []
    assert not caplog.records


def test_looking_does_not_wait_for_the_collection(stores: Stores, db: Database) -> None:
    lock = store_folder(stores.settings) / "locks" / "collecting"
    lock.parent.mkdir(parents=True)
    found = Housekeeping(stores, db.engine, db.store, threading.Event())
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # somebody commits
        found.look()
        assert found.busy
        found.look()
    found.join(20)
    assert not found.busy


def test_it_stops_with_the_service_and_leaves_the_rest_to_another(stores: Stores, db: Database) -> None:
    stopping = threading.Event()
    stopping.set()
    leave_garbage(stores)
    looked(stores, db, stopping)
    assert areas(stores) == ["sae"]
