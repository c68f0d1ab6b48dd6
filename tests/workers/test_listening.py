"""When a worker is held to be deaf, and when not."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from service.infra.settings import load_settings
from service.jobs.clock import utc_after
from service.jobs.database import writing
from service.jobs.queue import Sender
from service.jobs.tables import units
from tests.helpers.databases import PEPPER, Database, database
from tests.helpers.servers import Redis, redis_server
from workers.listening import RECONNECT_SECONDS, Ear, Watch


class Clock:
    """Monotonic time, as a test wants it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Worker:
    """What is asked about a worker of queue cpu that has listened for a while."""

    def __init__(self, db: Database) -> None:
        self.clock = Clock()
        self.ear = Ear(self.clock)
        self.ear.connected()
        self.sender = Sender(db.settings)
        self.watch = Watch(db.settings, db.store, self.sender, self.ear)
        self.wait()

    def wait(self) -> None:
        self.clock.now += self.watch.pause

    def looks(self, between: Callable[[], object] = lambda: None) -> list[bool]:
        """What two looks say, with something in between."""
        first = self.watch.is_deaf()
        self.wait()
        between()
        return [first, self.watch.is_deaf()]


@pytest.fixture
def db(tmp_path: Path, redis_url: str) -> Iterator[Database]:
    with database(load_settings(home=tmp_path, broker_url=redis_url, queues="cpu", secret_pepper=PEPPER)) as found:
        yield found


def send(db: Database, queue: str = "cpu", *, sends: int = 2, age: float = 1.0, message: bool = True) -> int:
    """A unit that the dispatcher has sent; its message lies in Redis."""
    db.submit(f"pairs@{queue}")
    (unit, *_) = db.store.ready_units(queue, 1)
    assert db.store.mark_sent(unit)
    with writing(db.engine) as connection:
        connection.execute(update(units).where(units.c.id == unit).values(sends=sends, sent_at=utc_after(-age)))
    if message:
        sender = Sender(db.settings)
        sender.send(unit, queue)
        sender.close()
    return unit


@pytest.mark.parametrize(("sends", "age"), [(2, 1.0), (1, 31.0)])
def test_a_worker_is_deaf_when_its_message_lies_there_at_two_looks(db: Database, sends: int, age: float) -> None:
    worker = Worker(db)
    worker.clock.now += 10.0
    send(db, sends=sends, age=age)
    assert worker.looks() == [False, True]
    with worker.ear.message() as heard:
        assert not heard  # what comes now is left to others


def test_a_message_that_was_sent_just_now_proves_nothing(db: Database) -> None:
    worker = Worker(db)
    send(db, sends=1)
    assert worker.looks() == [False, False]


def test_what_others_have_taken_proves_nothing(db: Database, redis: Redis) -> None:
    worker = Worker(db)
    unit = send(db, message=False)  # another worker has the message, and not yet the lease
    assert worker.looks() == [False, False]
    send(db, message=True)

    def take() -> None:
        db.store.lease(unit, "another")
        redis.flush()

    assert worker.looks(take) == [False, False]


def test_what_was_sent_before_the_worker_listened_proves_nothing(db: Database) -> None:
    worker = Worker(db)
    send(db, age=worker.watch.pause + 60.0)
    assert worker.looks() == [False, False]


def test_units_of_other_queues_and_units_that_may_not_start_prove_nothing(db: Database) -> None:
    worker = Worker(db)
    send(db, "gpu")
    db.submit("pairs")  # ready, but not handed out
    sender = Sender(db.settings)
    sender.send(10**6, "cpu")  # of a job that is gone
    assert worker.looks() == [False, False]


def test_a_worker_that_works_or_has_heard_something_is_not_deaf(db: Database) -> None:
    worker = Worker(db)
    send(db)
    with worker.ear.message() as heard:
        assert heard
        assert worker.looks() == [False, False]
    worker.wait()

    def hear() -> None:
        with worker.ear.message():
            worker.clock.now += 1.0

    assert worker.looks(hear) == [False, False]
    worker.wait()
    assert worker.looks() == [False, True]


def test_a_message_that_comes_at_the_last_moment_is_dealt_with() -> None:
    ear = Ear()
    ear.connected()
    since = ear.since
    assert since is not None
    with ear.message() as heard:
        assert heard
        assert not ear.close(since)
    assert not ear.close(since)


def test_a_worker_that_has_lost_redis_has_time_to_find_it_again(db: Database) -> None:
    worker = Worker(db)
    send(db)
    worker.ear.disconnected()
    with worker.ear.message():  # what it had in hand goes on meanwhile
        pass
    assert worker.looks() == [False, False]
    worker.clock.now += RECONNECT_SECONDS
    worker.wait()
    assert worker.looks() == [False, True]


def test_nothing_is_concluded_while_redis_or_the_database_is_away(tmp_path: Path) -> None:
    server = redis_server(tmp_path)
    server.start()
    with database(load_settings(home=tmp_path, broker_url=server.url, queues="cpu", secret_pepper=PEPPER)) as db:
        worker = Worker(db)
        send(db)
        assert worker.looks(lambda: server.stop(signal.SIGKILL)) == [False, False]
        server.start()  # it has forgotten everything
        assert worker.looks() == [False, False]
        worker.sender.send(1, "cpu")
        assert worker.looks() == [False, True]
    server.stop()
