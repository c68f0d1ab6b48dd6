from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis as redis_package
from pydantic import SecretStr

from service.errors import Unavailable
from service.infra.settings import Settings
from service.jobs.dispatcher import LEADER, Dispatcher
from service.jobs.model import UnitState
from service.jobs.queue import Sender
from tests.helpers.databases import Database, database, memory_folder, settings_for
from tests.helpers.servers import Redis, redis_server, wait_until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Redis]:
    found = redis_server(tmp_path)
    found.start()
    yield found
    found.stop()


@pytest.fixture
def db(server: Redis) -> Iterator[Database]:
    with _database(server) as found:
        yield found


@contextmanager
def _database(server: Redis, **times: float) -> Iterator[Database]:
    with memory_folder() as folder:
        update = {"broker_url": SecretStr(server.url), "queue_depth": 2, **TIMES, **times}
        settings = settings_for(folder, None).model_copy(update=update)
        with database(settings) as found:
            yield found


TIMES = {"resend_seconds": 0.2, "reconcile_seconds": 0.1, "dispatch_seconds": 0.05}


def dispatcher_of(db: Database) -> Dispatcher:
    return Dispatcher(db.store, Sender(db.settings), db.settings)


def messages(server: Redis, queue: str = "cpu") -> list[int]:
    """Ids of the units in a queue, oldest first."""
    with redis_package.Redis(port=server.port) as client:
        found = client.lrange(queue, 0, -1)
        assert isinstance(found, list)
    return [json.loads(base64.b64decode(json.loads(item)["body"]))[0][0] for item in reversed(found)]


def states(db: Database) -> list[UnitState]:
    facts = {each.queue: each for each in db.store.queue_facts()}["cpu"]
    return [UnitState.READY] * facts.ready + [UnitState.SENT] * facts.sent + [UnitState.LEASED] * facts.leased


def test_a_queue_is_kept_only_so_many_messages_deep(server: Redis) -> None:
    with _database(server, resend_seconds=600.0) as db:  # a machine that stalls must not count as a message that is lost
        for _ in range(5):
            db.submit()
        dispatcher = dispatcher_of(db)
        assert dispatcher.step()
        assert not dispatcher.step()
        assert len(messages(server)) == 2
        (first, _) = messages(server)
        assert db.store.lease(first, "w") is not None
        assert dispatcher.step()
        assert states(db).count(UnitState.SENT) == 2
        assert states(db).count(UnitState.LEASED) == 1


def test_what_redis_lost_is_sent_again(db: Database, server: Redis) -> None:
    job = db.submit()
    dispatcher = dispatcher_of(db)
    dispatcher.step()
    (unit,) = db.store.units(job.id)
    server.flush()
    wait_until(lambda: dispatcher.step() or messages(server) == [unit.id], "the message is sent again")
    assert states(db) == [UnitState.SENT]


def test_a_broker_that_is_away_loses_nothing(db: Database, server: Redis) -> None:
    jobs = [db.submit() for _ in range(2)]
    dispatcher = dispatcher_of(db)
    server.stop()
    with pytest.raises(Unavailable):
        dispatcher.step()
    server.start()
    dispatcher.step()
    wanted = {unit.id for job in jobs for unit in db.store.units(job.id)}
    assert set(messages(server)) == wanted


def test_only_the_leader_hands_out_and_the_next_follows_at_once(db: Database, server: Redis) -> None:
    db.submit()
    first, second = dispatcher_of(db), dispatcher_of(db)
    assert first.holder != second.holder
    assert first.step()
    db.submit()
    assert not second.step()
    assert len(messages(server)) == 1
    stop = threading.Event()
    stop.set()
    first.run(stop)
    assert second.step()
    assert len(messages(server)) == 2
    assert not db.store.lead(LEADER, first.holder, 1.0)


def test_it_runs_through_an_outage_until_told_to_stop(db: Database, server: Redis) -> None:
    stop, rounds = threading.Event(), list[int]()
    dispatcher = Dispatcher(db.store, Sender(db.settings), db.settings, lambda: rounds.append(1))
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    try:
        first = db.submit()
        wait_until(lambda: len(messages(server)) >= 1, "the first is sent")
        server.stop()
        second = db.submit()
        server.start()
        wanted = {unit.id for job in (first, second) for unit in db.store.units(job.id)}
        wait_until(lambda: wanted <= set(messages(server)), "both are there after the outage")
        assert rounds
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()


class Listening(Sender):
    """Notes each wait of a dispatcher, and whether a wake ended it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.begun = 0
        self.heard: list[bool] = []

    def wait_for_wake(self, seconds: float) -> bool:
        self.begun += 1
        found = super().wait_for_wake(seconds)
        self.heard.append(found)
        return found


def test_a_dispatcher_that_is_woken_looks_at_once(db: Database, server: Redis) -> None:
    slow = db.settings.model_copy(update={"dispatch_seconds": 3600.0})
    sender, stop = Listening(slow), threading.Event()
    thread = threading.Thread(target=Dispatcher(db.store, sender, slow).run, args=(stop,))
    thread.start()
    try:
        for number in (1, 2):
            wait_until(lambda: sender.begun > len(sender.heard), "the dispatcher waits")
            db.submit()
            Sender(slow).wake()
            wait_until(lambda: sender.heard.count(True) == number, "the wake is heard", 20)  # noqa: B023 - called at once
            wait_until(lambda: len(messages(server)) == number, "the message is there")  # noqa: B023 - called at once
    finally:
        stop.set()
        Sender(slow).wake()
        thread.join(20)
    assert not thread.is_alive()
