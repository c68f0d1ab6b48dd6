"""A machine whose clock is not that of S3: its requests and URLs are signed with the time of S3."""

from __future__ import annotations

import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.infra.s3_clock import EndpointClock
from tests.helpers.fault_proxy import FaultProxy, fault_proxy
from tests.helpers.servers import S3
from tests.helpers.store_world import KEY, World, put

HOUR = 3600.0


@pytest.fixture
def proxy(s3_moto: S3) -> Iterator[FaultProxy]:
    """S3 that refuses what was signed a quarter of an hour from its own time."""
    with fault_proxy(s3_moto.endpoint) as running:
        running.ahead_seconds = 0.0
        yield running


@pytest.fixture
def world(folder: Path, s3_moto: S3, proxy: FaultProxy) -> World:
    return World(folder, s3_moto, s3_endpoint=proxy.url, s3_deadline_seconds=5)


def refusals(proxy: FaultProxy) -> int:
    return sum(request.startswith("skewed ") for request in proxy.requests)


@pytest.mark.parametrize("ahead", [HOUR, -HOUR, 30 * 24 * HOUR])
def test_one_refusal_corrects_every_later_request(
    world: World, proxy: FaultProxy, caplog: pytest.LogCaptureFixture, ahead: float
) -> None:
    proxy.ahead_seconds = ahead
    client = world.stores().s3
    assert client is not None
    with caplog.at_level(logging.INFO, "service.infra.s3_clock"):
        client.check()  # HEAD: a refusal without a word
        for number in range(3):
            client.put(f"name-{number}", b"data")
        assert client.get("name-1") == b"data"
    assert refusals(proxy) == 1
    (line,) = caplog.messages
    told = re.search(r"(\d+) s (behind|ahead of)", line)
    assert told is not None
    assert abs(int(told[1]) - abs(ahead)) < 5
    assert told[2] == ("behind" if ahead > 0 else "ahead of")
    assert abs(client.now() - time.time() - ahead) < 5


def test_a_refusal_with_a_code_is_enough(world: World, proxy: FaultProxy) -> None:
    proxy.ahead_seconds = -HOUR
    put(world.store(), {"a": b"data"})
    assert world.store(machine="two").read("pairs", KEY).path("a").read_bytes() == b"data"


def test_a_clock_that_is_set_while_the_client_lives(world: World, proxy: FaultProxy) -> None:
    client = world.stores().s3
    assert client is not None
    for ahead in (HOUR, 0.0, -HOUR):
        proxy.ahead_seconds = ahead
        client.put("name", b"data")
        assert abs(client.now() - time.time() - ahead) < 5


@pytest.mark.parametrize("ahead", [HOUR, -HOUR])
def test_presigned_urls_of_a_client_that_has_asked_nothing_yet(world: World, proxy: FaultProxy, ahead: float) -> None:
    proxy.ahead_seconds = ahead
    put_url = world.stores().s3.presigned_put("name", 60, 4)  # type: ignore[union-attr]
    plain = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(put_url, b"data", plain, method="PUT"), timeout=10).close()
    get_url = world.stores().s3.presigned_get("name", 60, "name", "text/plain")  # type: ignore[union-attr]
    with urllib.request.urlopen(get_url, timeout=10) as answer:
        assert answer.read() == b"data"
    proxy.ahead_seconds = -ahead
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(get_url, timeout=10)


def test_a_url_is_made_while_s3_is_away(world: World) -> None:
    client = world.stores(s3_endpoint="http://127.0.0.1:9").s3
    assert client is not None
    assert "X-Amz-Signature" in client.presigned_get("name", 60, "name", "text/plain")


def test_what_is_no_date_or_nearly_ours_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    clock = EndpointClock()
    for date in (None, "", "yesterday", "Thu, 99 Jan 1970 00:00:00 GMT"):
        clock.learn(date)
        assert not clock.fresh
    clock.learn(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() - 40)))
    assert clock.fresh
    assert abs(clock.now() - time.time()) < 1
    assert caplog.messages == []
