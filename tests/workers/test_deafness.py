"""A real worker that has gone deaf is started again by whoever keeps it running, and the job ends."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.jobs.model import FINAL_JOB_STATES, JobState
from service.processes import Program, Supervisor
from tests.helpers.relay import Relay
from tests.helpers.servers import Redis, redis_server, wait_until
from tests.helpers.workplace import Workplace, audit_of, material
from workers.listening import DEAF

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
_MESSAGE = b"safer.unit"


@pytest.fixture
def relay(redis: Redis, redis_url: str) -> Iterator[Relay]:
    """Between workers and Redis."""
    with Relay(redis.port) as running:
        yield running


@pytest.fixture
def place(tmp_path: Path, redis_url: str) -> Iterator[Workplace]:
    workplace = Workplace(tmp_path, broker_url=redis_url)
    yield workplace
    workplace.close()


def through(relay: Relay) -> dict[str, str]:
    return {"SAFER_BROKER_URL": f"redis://127.0.0.1:{relay.port}/0"}


def listens(place: Workplace) -> None:
    wait_until(lambda: " serves " in place.log(), "the worker listens")
    time.sleep(3.0)  # Celery connects


def test_a_deaf_worker_is_started_again_and_the_job_ends(place: Workplace, relay: Relay, tmp_path: Path) -> None:
    told: list[str] = []
    command = (sys.executable, "-m", "workers")
    program = Program("worker-1", command, {**place.environment, **through(relay)}, tmp_path / "worker.log", 20.0)
    supervisor = Supervisor([program], told.append)  # as `up` does it
    child = supervisor.start("worker-1")
    try:
        listens(place)
        relay.stall_next(_MESSAGE)
        with place.dispatching():
            job = place.submit(audit_of(place, material(tmp_path / "files")))

            def ended() -> bool:
                supervisor.watch()
                return place.jobs.job(job.id).state in FINAL_JOB_STATES

            wait_until(ended, "the job ends", 240)
    finally:
        supervisor.stop(lambda: False)
    assert relay.stalled == 1
    assert place.jobs.job(job.id).state is JobState.SUCCEEDED, place.log()
    assert child.starts == 2
    (line,) = told
    assert line.startswith(f"worker-1 ended (exit code {DEAF}), starting it again")
    assert "hears nothing any more" in line


def test_a_worker_that_goes_deaf_after_its_first_units_is_noticed_too(place: Workplace, relay: Relay, tmp_path: Path) -> None:
    files = material(tmp_path / "files")
    worker = place.worker(**through(relay))
    with place.dispatching():
        first = place.wait(place.submit(audit_of(place, files)))
        assert first.state is JobState.SUCCEEDED
        relay.stall_next(_MESSAGE)
        second = place.submit(audit_of(place, files, seed=2))
        assert worker.wait(120) == DEAF
        place.worker(**through(relay))
        assert place.wait(second).state is JobState.SUCCEEDED


def test_healthy_workers_stay(tmp_path: Path) -> None:
    """Idle ones beside a stopped one that swallows a message; one whose Redis is away, and comes back empty."""
    redis = redis_server(tmp_path)
    redis.start()
    place = Workplace(tmp_path, broker_url=redis.url)
    files = material(tmp_path / "files")
    workers = [place.worker() for _ in range(2)]
    try:
        listens(place)
        stopped = place.worker()
        time.sleep(8.0)
        stopped.send_signal(signal.SIGSTOP)
        with place.dispatching():
            job = place.wait(place.submit(audit_of(place, files)))
            redis.stop(signal.SIGKILL)
            late = place.submit(audit_of(place, files, seed=2))
            time.sleep(40.0)  # longer than Celery's pauses between attempts, and than two looks
            redis.start()
            stopped.send_signal(signal.SIGCONT)
            late = place.wait(late)
            time.sleep(25.0)  # idle, and nothing to do: two looks
        assert (job.state, late.state) == (JobState.SUCCEEDED, JobState.SUCCEEDED)
        assert [worker.poll() for worker in (*workers, stopped)] == [None, None, None], place.log()
        assert "hears nothing" not in place.log()
    finally:
        place.close()
        redis.stop()
