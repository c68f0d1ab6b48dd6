from __future__ import annotations

import time
from pathlib import Path

import pytest
import redis as redis_package

from service.errors import Unavailable
from service.infra.settings import load_settings
from service.jobs.queue import Sender, redis_url
from tests.helpers.servers import Redis, redis_server


def length(redis: Redis, queue: str) -> int:
    with redis_package.Redis(port=redis.port) as client:
        found = client.llen(queue)
        assert isinstance(found, int)
        return found


def test_a_message_is_one_entry_of_a_list_even_after_redis_lost_everything(redis: Redis, redis_url: str) -> None:
    sender = Sender(load_settings(broker_url=redis_url))
    sender.send(1, "cpu")
    sender.send(2, "gpu")
    assert (length(redis, "cpu"), length(redis, "gpu")) == (1, 1)
    redis.flush()
    sender.send(1, "cpu")
    assert length(redis, "cpu") == 1
    sender.close()


def test_a_wake_is_heard_once_however_often_it_was_called(redis_url: str) -> None:
    sender = Sender(load_settings(broker_url=redis_url))
    assert not sender.wait_for_wake(0.05)
    sender.wake()
    sender.wake()
    assert sender.wait_for_wake(5.0)
    assert not sender.wait_for_wake(0.05)
    sender.close()


def test_a_long_queue_loses_its_oldest_messages(redis: Redis, redis_url: str) -> None:
    sender = Sender(load_settings(broker_url=redis_url))
    with redis_package.Redis(port=redis.port) as client:
        client.lpush("gpu", *range(1200))
        sender.trim()
        assert client.llen("gpu") == 1000
        assert client.lindex("gpu", 0) == b"1199"
    sender.close()


def test_a_broker_that_is_away_or_hangs_costs_a_bounded_time(tmp_path: Path) -> None:
    server = redis_server(tmp_path)
    server.start()
    sender = Sender(load_settings(broker_url=server.url))
    try:
        sender.send(1, "cpu")
        sender.ping()
        server.pause()
        began = time.monotonic()
        with pytest.raises(Unavailable):
            sender.send(1, "cpu")
        with pytest.raises(Unavailable):
            sender.ping()
        sender.wake()
        assert time.monotonic() - began < 30.0
        server.resume()
        sender.ping()
        server.stop()
        with pytest.raises(Unavailable):
            sender.send(1, "cpu")
        with pytest.raises(Unavailable):
            sender.ping()
        with pytest.raises(Unavailable):
            sender.trim()
        sender.wake()
        assert not sender.wait_for_wake(0.01)
        server.start()
        sender.send(1, "cpu")
        sender.ping()
        assert length(server, "cpu") == 1
    finally:
        sender.close()
        server.stop()


@pytest.mark.parametrize(
    ("broker", "url"),
    [
        ("redis://u:p@h:1/2", "redis://u:p@h:1/2"),
        ("rediss://h:1", "rediss://h:1"),
        ("redis+socket:///run/valkey.sock", "unix:///run/valkey.sock"),
        ("redis+socket:///run/valkey.sock?virtual_host=3", "unix:///run/valkey.sock?db=3"),
    ],
)
def test_urls_of_the_broker_as_the_redis_package_writes_them(broker: str, url: str) -> None:
    assert redis_url(broker) == url
