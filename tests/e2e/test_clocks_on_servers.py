"""Machines whose clock is off by an hour or more, parents and children alike, on real servers: every job ends as it is to end."""

from __future__ import annotations

import itertools
import json
import re
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.helpers.clocks import off_by, sweep
from tests.helpers.deployment import Deployment
from tests.helpers.servers import S3, Postgres, Redis, wait_until
from tests.helpers.workplace import material, stop_group, working_child

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
HOUR, DAY = 3600, 86_400
_SEEDS = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def swept() -> Iterator[None]:
    yield
    sweep()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return material(tmp_path_factory.mktemp("of the client"))


def deployed(folder: Path, redis: Redis, postgres: Postgres, s3: S3) -> Deployment:
    redis.flush()
    given = {**s3.settings(folder.name), "database_url": postgres.fresh(folder.name), "s3_deadline_seconds": 20.0}
    return Deployment(folder / "place", broker_url=redis.url, **given)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, redis: Redis, postgres: Postgres, s3_rgw: S3) -> Iterator[Deployment]:
    """On a gateway that refuses what is signed a quarter of an hour from its own time, as AWS does."""
    made = deployed(tmp_path_factory.mktemp("clocks"), redis, postgres, s3_rgw)
    yield made
    made.close()


@pytest.fixture
def place(built: Deployment) -> Iterator[Deployment]:
    """A service of which nothing runs yet."""
    yield built
    for worker in built.workers:
        stop_group(worker, signal.SIGKILL)
    built.api.stop()


def check_worker(place: Deployment, files: dict[str, Path], off: int) -> str:
    """A worker whose clock is off does a whole job by itself, each step once, beside others with the right time; its log."""
    place.start_api()
    place.worker(**off_by(off))
    job_id = place.submit(files, seed=next(_SEEDS))
    place.check_sound(job_id)
    assert {unit.attempts for unit in place.jobs.units(job_id)} == {1}
    log = (place.folder / f"worker-{len(place.workers) - 1}.log").read_text()
    told = [datetime.fromisoformat(json.loads(line)["at"]) for line in log.splitlines() if line.startswith("{")]
    assert {round((at.timestamp() - time.time()) / HOUR) for at in told} == {off // HOUR}
    return log


@pytest.mark.parametrize("off", [HOUR, -HOUR])
def test_a_worker_is_off_by_an_hour(place: Deployment, files: dict[str, Path], off: int) -> None:
    log = check_worker(place, files, off)
    direction = "ahead of" if off > 0 else "behind"
    assert re.search(rf"clock of this machine is 3(599|60[01]) s {direction} that of S3", log), log[-3000:]
    assert "given back" not in log


def test_a_worker_is_off_by_an_hour_where_s3_does_not_mind(
    tmp_path: Path, files: dict[str, Path], redis: Redis, postgres: Postgres, s3_moto: S3
) -> None:
    (folder := tmp_path / "clocks-moto").mkdir()
    place = deployed(folder, redis, postgres, s3_moto)
    try:
        check_worker(place, files, HOUR)
    finally:
        place.close()


def test_workers_of_different_times_share_jobs_and_are_killed(place: Deployment, files: dict[str, Path]) -> None:
    place.start_api()
    workers = [place.worker(**off_by(off)) for off in (HOUR, -HOUR)]
    place.worker()
    same = next(_SEEDS)
    jobs = [place.submit(files, seed=same), place.submit(files, seed=same), place.submit(files, seed=next(_SEEDS))]
    wait_until(lambda: any(working_child(worker.pid) for worker in workers), "a worker whose clock is off computes")
    for worker in workers:
        stop_group(worker, signal.SIGKILL)
    for off in (HOUR, -HOUR):
        place.worker(**off_by(off))
    place.check_sound(*jobs)


@pytest.mark.parametrize("off", [HOUR, -HOUR])
def test_an_api_is_off_by_an_hour(place: Deployment, files: dict[str, Path], tmp_path: Path, off: int) -> None:
    """It dispatches; files go up and come down by URLs that it signs."""
    place.start_api(**off_by(off))
    place.worker()
    fresh = material(tmp_path / "fresh", pairs=40 + next(_SEEDS))  # other data, which is sent
    job_id = place.submit(fresh)
    place.check_sound(job_id)
    assert {unit.attempts for unit in place.jobs.units(job_id)} == {1}
    place.cli("download", job_id, "sae/*", "--out", tmp_path / "downloaded")
    assert list((tmp_path / "downloaded").rglob("*.safetensors"))


def test_an_operator_whose_clock_is_a_month_ahead_removes_nothing_young(place: Deployment, files: dict[str, Path]) -> None:
    place.start_api()
    place.worker()
    job_id = place.submit(files)
    place.check_sound(job_id)
    told = json.loads(place.run("admin", "store", "gc", "--json", code=0, **off_by(31 * DAY)).stdout)
    assert told["items"] == []
    place.check_sound(job_id)
