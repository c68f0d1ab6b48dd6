"""Faults in a whole deployment: API, workers, Redis, PostgreSQL and S3 fail while jobs run; every job ends as it is to end."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from safer_engine.errors import SaferError
from service.client import Submission
from service.jobs.model import JobState
from tests.helpers.deployment import Deployment
from tests.helpers.fault_proxy import Fault, FaultProxy, fault_proxy
from tests.helpers.servers import (
    LOCAL,
    Postgres,
    Redis,
    missing,
    moto_server,
    postgres_server,
    redis_server,
    s3_bucket,
    wait_until,
)
from tests.helpers.workplace import material, stop_group

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
_SUBMISSIONS = 12


@dataclass
class Town:
    """A deployment on servers of its own, which a test may stop."""

    place: Deployment
    redis: Redis
    postgres: Postgres
    proxy: FaultProxy
    files: dict[str, Path]
    seed: int = 0

    def submit(self, **sections: Any) -> str:
        """A job that has to compute all its stages."""
        self.seed += 1
        return self.place.submit(self.files, seed=self.seed, **sections)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return material(tmp_path_factory.mktemp("of the client"))


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory, files: dict[str, Path]) -> Iterator[Town]:
    folder = tmp_path_factory.mktemp("town")
    redis, postgres, moto = redis_server(folder), postgres_server(), moto_server(folder)
    place = None
    try:
        for server in (redis, postgres, moto):
            server.start()
        wait_until(postgres.answers, "PostgreSQL answers")
        bucket = s3_bucket(f"http://{LOCAL}:{moto.port}", "test-access-key", "test-secret-key")
        with fault_proxy(bucket.endpoint) as proxy:
            given = {**bucket.settings("town"), "s3_endpoint": proxy.url, "s3_deadline_seconds": 20.0}
            place = Deployment(folder / "place", broker_url=redis.url, database_url=postgres.fresh("town"), **given)
            place.start(workers=2)
            yield Town(place, redis, postgres, proxy, files)
    finally:
        if place is not None:
            place.close()
        for server in (moto, postgres, redis):
            server.stop()


def test_the_api_is_killed_between_commit_and_dispatch(town: Town) -> None:
    town.redis.stop(signal.SIGKILL)  # nothing can be dispatched
    job_id = town.submit()
    town.place.api.stop(signal.SIGKILL)
    assert town.place.jobs.job(job_id).state is JobState.QUEUED
    town.redis.start()
    town.place.start_api()
    town.place.check_sound(job_id)


def test_the_api_is_killed_amid_submissions(town: Town) -> None:
    """Whoever got an answer has a job; whoever got none asks again under the same key, and has one job."""
    submission = spec_of(town)
    acknowledged: dict[str, str] = {}

    def submit_all() -> None:
        for number in range(_SUBMISSIONS):
            key = f"amid-{number}"
            while key not in acknowledged:
                with suppress(SaferError), town.place.client() as client:
                    acknowledged[key] = client.submit(submission(key)).id
                time.sleep(0.05)

    thread = threading.Thread(target=submit_all)
    thread.start()
    for enough in (3, 8):
        wait_until(lambda: len(acknowledged) >= enough, "some are submitted")  # noqa: B023 - called at once
        before = dict(acknowledged)
        town.place.api.stop(signal.SIGKILL)
        town.place.start_api()
        with town.place.client() as client:
            assert all(client.job(job_id).id == job_id for job_id in before.values())
    thread.join()
    with town.place.client() as client:
        assert {key: client.submit(submission(key)).id for key in acknowledged} == acknowledged
    assert len(set(acknowledged.values())) == _SUBMISSIONS
    town.place.check_sound(*acknowledged.values())


def spec_of(town: Town) -> Callable[[str], Submission]:
    """Makes submissions of an audit that was computed before, so that it is quick."""
    done = town.submit()
    town.place.check_sound(done)
    spec = town.place.jobs.job(done).spec
    return lambda key: Submission(spec=spec, idempotency_key=key)


def test_redis_is_away_for_a_while_and_forgets_everything(town: Town) -> None:
    jobs = [town.submit(), town.submit()]
    town.place.wait_stage(jobs[0], "activations")
    town.redis.stop(signal.SIGKILL)
    time.sleep(20.0)
    late = town.submit()
    town.redis.start()
    town.place.wait_stage(late, "prepare")
    town.redis.flush()
    town.place.check_sound(*jobs, late)


def test_the_database_is_restarted(town: Town) -> None:
    jobs = [town.submit(), town.submit()]
    for stage, how in (("pairs", signal.SIGQUIT), ("sae", signal.SIGINT), ("pair_scores", signal.SIGQUIT)):
        town.place.wait_stage(jobs[0], stage)
        town.postgres.stop(how)
        time.sleep(2.0)
        assert not town.place.ready()
        town.postgres.start()
        wait_until(town.postgres.answers, "PostgreSQL answers")
    town.place.check_sound(*jobs)
    wait_until(town.place.ready, "the API is ready again")


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("error", times=40, status=500), Fault("error", times=10, status=503)],
        [Fault("slow", times=30, seconds=2.0)],
        [Fault("lost", method="PUT|POST", times=25, status=500)],
        [Fault("cut_request", method="PUT", times=15, least=2000, after=1000)],
        [Fault("cut_answer", method="GET", times=15, least=2000, after=1000)],
    ],
    ids=["errors", "slow", "lost answers", "cut requests", "cut answers"],
)
def test_s3_fails_for_a_while(town: Town, faults: list[Fault]) -> None:
    job_id = town.submit()
    town.place.wait_stage(job_id, "pairs")
    for fault in faults:
        town.proxy.add(fault)
    try:
        town.place.check_sound(job_id)
    finally:
        town.proxy.faults.clear()
    assert all(fault.hits > 3 for fault in faults), faults


def test_s3_is_out_for_longer_than_anyone_waits(town: Town) -> None:
    job_id = town.submit()
    town.place.wait_stage(job_id, "activations")
    outage = town.proxy.add(Fault("error", times=None, status=500))
    wait_until(lambda: "given back" in town.place.logs(), "a worker gives its unit back", 200)
    assert not town.place.ready()
    town.proxy.faults.remove(outage)
    town.place.check_sound(job_id)


def test_everything_is_killed_at_once(town: Town) -> None:
    jobs = [town.submit(), town.submit()]
    town.place.wait_stage(jobs[0], "sae")
    town.place.api.stop(signal.SIGKILL)
    for worker in town.place.workers:
        stop_group(worker, signal.SIGKILL)
    town.redis.stop(signal.SIGKILL)
    town.postgres.stop(signal.SIGQUIT)
    town.redis.start()
    town.postgres.start()
    wait_until(town.postgres.answers, "PostgreSQL answers")
    town.place.start(workers=2)
    town.place.check_sound(*jobs)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], capture_output=True, check=False)
    if made.returncode:
        missing("the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Fill a disk; remove the file to have it empty again."""
    ballast = folder / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


@pytest.mark.parametrize("full", ["of the worker", "of the store"])
def test_a_disk_is_full(tmp_path: Path, small_disk: Path, redis: Redis, files: dict[str, Path], full: str) -> None:
    given: dict[str, Any] = {"home": small_disk / "home"}
    if full == "of the store":
        given = {"home": tmp_path / "home", "store_url": str(small_disk / "artifacts")}
    redis.flush()
    place = Deployment(tmp_path / "place", broker_url=redis.url, max_failures=2, **given)
    try:
        place.start_api()
        job_id = place.submit(files)
        ballast = fill(small_disk)
        place.worker()
        failed = place.wait(job_id)
        assert failed.error is not None
        assert (failed.state, failed.error.code) == (JobState.FAILED, "resource_exhausted"), (failed.error, place.logs()[-3000:])
        assert "free disk space" in failed.error.hint
        assert str(tmp_path) not in failed.error.message  # where a worker keeps its files is nobody's business
        ballast.unlink()
        place.check_sound()
        assert place.ask("retry", job_id)["state"] in ("queued", "running")
        place.check_sound(job_id)
    finally:
        place.close()


def test_the_disk_of_the_whole_service_is_full_for_a_while(small_disk: Path, redis: Redis, files: dict[str, Path]) -> None:
    """Jobs and artifacts share a disk, as under `up`: nothing can be written, not even that nothing can be written."""
    redis.flush()
    place = Deployment(small_disk / "place", broker_url=redis.url)
    try:
        place.start()
        flags = place.submit_flags(files, seed=99)
        job_id = place.submit(files)
        place.wait_stage(job_id, "activations")
        ballast = fill(small_disk)
        time.sleep(10.0)
        assert "free disk space" in place.cli("submit", *flags, code=5).stderr
        ballast.unlink()
        place.check_sound(job_id)
    finally:
        place.close()
