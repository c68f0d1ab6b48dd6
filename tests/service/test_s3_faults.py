"""S3 that answers 500, loses answers, is slow, or breaks off: what arrives is whole, or nothing does."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from safer_engine.errors import ArtifactError
from service.errors import Unavailable
from service.infra.logs import configure_logging
from service.infra.stores import Stores
from tests.helpers.fault_proxy import Fault, FaultProxy, fault_proxy
from tests.helpers.servers import S3, wait_until
from tests.helpers.store_world import KEY, World, draft, put

pytestmark = pytest.mark.full
DATA = os.urandom(11 << 20)
BLOBS = r"/blobs/"
PARTS = 5 << 20


@pytest.fixture
def proxy(s3_moto: S3) -> Iterator[FaultProxy]:
    with fault_proxy(s3_moto.endpoint) as running:
        yield running


@pytest.fixture
def world(folder: Path, s3_moto: S3, proxy: FaultProxy) -> World:
    """Machines reach the bucket through the proxy; `direct` does not."""
    return World(folder, s3_moto, s3_endpoint=proxy.url, s3_part_bytes=PARTS, s3_deadline_seconds=20)


def direct(world: World, s3: S3) -> Stores:
    return world.stores("direct", s3_endpoint=s3.endpoint)


def names(world: World, s3: S3, prefix: str) -> list[str]:
    return [found.name for found in direct(world, s3).space.listing(prefix)]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("error", "PUT", BLOBS, times=3),
        Fault("error", "PUT", BLOBS, times=2, status=503),
        Fault("error", "POST", BLOBS, times=3),
        Fault("lost", "PUT", BLOBS, times=2),
        Fault("lost", "POST", r"uploadId=", times=1),
        Fault("cut_request", "PUT", BLOBS, times=2, after=100_000),
        Fault("error", "PUT", r"/manifests/", times=3),
        Fault("lost", "PUT", r"/manifests/", times=1),
        Fault("error", "PUT", r"/manifests/", times=1, status=409),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.method}-{fault.path.strip('/')}-{fault.status}",
)
def test_a_commit_gets_through(world: World, proxy: FaultProxy, fault: Fault) -> None:
    proxy.add(fault)
    manifest = put(world.store(), {"a.bin": DATA})
    assert fault.hits == fault.times
    stored = world.store(machine="two").read("pairs", KEY)
    assert stored.manifest == manifest
    assert stored.path("a.bin").read_bytes() == DATA


@pytest.mark.parametrize(
    "fault",
    [
        Fault("error", "GET", BLOBS, times=3),
        Fault("cut_answer", "GET", BLOBS, times=4, after=1_300_000, least=1 << 20),
        Fault("cut_answer", "GET", BLOBS, times=2, after=0),
        Fault("slow", "GET", BLOBS, times=1, seconds=0.5),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.after}",
)
def test_a_download_gets_through(world: World, proxy: FaultProxy, fault: Fault) -> None:
    put(world.store(), {"a.bin": DATA})
    proxy.add(fault)
    assert world.store(machine="two").read("pairs", KEY).path("a.bin").read_bytes() == DATA
    assert fault.hits == fault.times
    fault.hits = 0
    assert b"".join(world.store().open_range("pairs", KEY, "a.bin", 10)) == DATA[10:]


def test_a_lost_manifest_answer_is_recognised_as_ones_own(world: World, proxy: FaultProxy) -> None:
    proxy.add(Fault("lost", "PUT", r"/manifests/", times=1))
    store = world.store()
    with store.open_work("pairs", KEY) as work:
        with work.publish("a.bin") as path:
            path.write_bytes(b"1")
        assert store.commit("pairs", KEY, work, draft(mine=True)).manifest.meta == {"mine": True}
    assert len([each for each in proxy.requests if each.startswith("PUT") and "/manifests/" in each]) >= 2


@pytest.mark.parametrize("kind", ["error", "cut_request"])
def test_patience_ends_and_nothing_is_visible(world: World, s3_moto: S3, proxy: FaultProxy, kind: str) -> None:
    proxy.add(Fault(kind, "PUT", BLOBS, times=None))  # type: ignore[arg-type]
    store = world.stores(s3_deadline_seconds=1).project("default")
    began = time.monotonic()
    with store.open_work("pairs", KEY) as work:
        with pytest.raises(Unavailable), work.publish("a.bin") as path:
            path.write_bytes(DATA)
        assert not work.has("a.bin")
    assert time.monotonic() - began < 60
    assert names(world, s3_moto, "blobs/") == []
    assert direct(world, s3_moto).s3.abort_uploads(time.time() + 60) == 0  # type: ignore[union-attr]
    assert not store.has("pairs", KEY)


def test_a_download_that_never_ends_well_leaves_nothing(world: World, proxy: FaultProxy) -> None:
    put(world.store(), {"a.bin": DATA})
    proxy.add(Fault("cut_answer", "GET", BLOBS, times=None, after=0))
    stored = world.stores("two", s3_deadline_seconds=1).project("default").read("pairs", KEY)
    with pytest.raises(Unavailable):
        stored.path("a.bin")
    cache = world.folder / "two" / "cache" / "blobs"
    assert [path for path in cache.iterdir() if not path.name.startswith(".")] == []
    assert [path for path in (cache / ".making").iterdir() if path.name != ".index"] == []


def test_a_slow_endpoint_is_not_ready_in_time(world: World, proxy: FaultProxy) -> None:
    proxy.add(Fault("slow", times=None, seconds=3))
    assert not world.stores(s3_deadline_seconds=0.5).readiness().ok


def _publish_for_ever(world: World) -> None:
    store = world.store(machine="killed")
    with store.open_work("pairs", KEY) as work:
        with work.publish("done.bin") as path:
            path.write_bytes(b"done")
        with work.publish("a.bin") as path:
            path.write_bytes(DATA)
        store.commit("pairs", KEY, work, draft())


def test_a_kill_in_mid_upload_leaves_nothing_visible(world: World, s3_moto: S3, proxy: FaultProxy) -> None:
    slow = proxy.add(Fault("slow", "PUT", rf"{BLOBS}.*partNumber", times=None, seconds=30))
    child = multiprocessing.get_context("spawn").Process(target=_publish_for_ever, args=(world,))
    child.start()
    wait_until(lambda: slow.hits > 0, "parts are being sent")
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    slow.times = 0
    assert not world.store().has("pairs", KEY)
    assert len(names(world, s3_moto, "blobs/")) == 1
    with world.store().open_work("pairs", KEY) as work:
        assert work.has("done.bin")
        assert not work.has("a.bin")
    put(world.store(machine="killed"), {"a.bin": DATA})
    assert world.store().read("pairs", KEY).path("a.bin").read_bytes() == DATA
    assert list((world.folder / "killed" / "cache" / "work" / "default").iterdir()) == []
    client = direct(world, s3_moto).s3
    assert client is not None
    assert client.abort_uploads(time.time() + 3600) >= 1


def test_machines_publish_under_faults_and_one_commit_wins(world: World, proxy: FaultProxy) -> None:
    for fault in (
        Fault("error", times=20, method="PUT|GET"),
        Fault("lost", "PUT", times=10),
        Fault("cut_answer", "GET", times=5),
    ):
        proxy.add(fault)
    found = []

    def commit(machine: str) -> None:
        found.append(put(world.store(machine=machine), {"a.bin": machine.encode()}))

    threads = [threading.Thread(target=commit, args=(f"m{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({manifest.attempt for manifest in found}) == 1
    assert len(found) == 4


def test_wrong_credentials_and_buckets_are_named(world: World, s3_moto: S3) -> None:
    missing = world.stores(store_url="s3://no-such-bucket/x")
    assert "no-such-bucket" in missing.readiness().detail
    with pytest.raises(ArtifactError, match="no artifact"):
        world.store().read("pairs", KEY)


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_secrets_and_presigned_urls_are_never_logged(
    world: World, s3_moto: S3, root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(world.settings(log_level="DEBUG"))
    put(world.store(), {"a.bin": b"1"})
    url = world.store().presigned("pairs", KEY, "a.bin")
    world.store(machine="two").read("pairs", KEY).path("a.bin")
    root_logger.debug("the end")
    assert url is not None
    signature = url.partition("X-Amz-Signature=")[2]
    logged = capsys.readouterr().err
    assert len(signature) >= 64
    assert "the end" in logged
    assert signature not in logged
    assert s3_moto.secret_key not in logged
