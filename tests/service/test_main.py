"""`python -m service` as a process: it starts, serves, and ends when asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from service.embedded import free_port
from service.infra.settings import Settings
from service.jobs.access import AccessStore, Role
from service.jobs.database import migrate, open_database
from service.jobs.model import JobKind
from service.jobs.requests import NewJob
from service.jobs.stage_plan import stages_of
from service.jobs.store import JobStore
from tests.helpers.databases import PEPPER, settings_for
from tests.helpers.servers import LOCAL, accepts, wait_until

ROOT = Path(__file__).parents[2]


def environment(settings: Settings, port: int, **given: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SAFER_")}
    return plain | {"SAFER_HOME": str(settings.folder), "SAFER_PORT": str(port), "SAFER_SECRET_PEPPER": PEPPER} | given


@contextmanager
def service(settings: Settings, broker: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    command = [sys.executable, "-m", "service"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(settings, port, SAFER_BROKER_URL=broker))
    try:
        wait_until(lambda: accepts(port) or process.poll() is not None, "the API listens", 60)
        yield process, f"http://{LOCAL}:{port}"
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "safer-audit migrate"),
        ({"SAFER_SECRET_PEPPER": ""}, "SAFER_SECRET_PEPPER"),
        ({"SAFER_PORT": "many"}, "SAFER_PORT"),
        ({"SAFER_DATABASE_URL": "mysql://x/y"}, "SAFER_DATABASE_URL"),
        ({"SAFER_DATABASE_URL": "postgresql+psycopg://x@127.0.0.1:1/y"}, "does the database run"),
    ],
)
def test_a_start_that_cannot_be_is_explained(tmp_path: Path, given: dict[str, str], said: str) -> None:
    found = environment(settings_for(tmp_path), free_port(), **given)
    done = subprocess.run([sys.executable, "-m", "service"], cwd=ROOT, env=found, capture_output=True, text=True, check=False)
    assert done.returncode == (4 if "does the database run" in said else 2)
    assert said in done.stderr
    assert PEPPER not in done.stderr


@pytest.mark.full
def test_it_serves_until_it_is_asked_to_stop_and_lets_streams_go(tmp_path: Path, redis_url: str) -> None:
    settings = settings_for(tmp_path)
    engine = open_database(settings)
    migrate(engine)
    access = AccessStore(engine, settings)
    access.ensure_project("default")
    key = access.create_key("default", "test", [Role.ADMIN], "test").secret
    job = JobStore(engine, settings).submit("default", NewJob(JobKind.AUDIT, {"seed": 0}, stages_of(JobKind.AUDIT))).job
    engine.dispose()
    with service(settings, redis_url) as (process, url):
        ready = httpx.get(f"{url}/readyz", trust_env=False)
        assert (ready.status_code, ready.json()["ok"]) == (200, True)
        headers = {"Authorization": f"Bearer {key}"}
        told: list[str] = []
        came = threading.Event()

        def watch() -> None:
            with httpx.stream("GET", f"{url}/v1/audits/{job.id}/events", headers=headers, trust_env=False, timeout=60) as stream:
                for line in stream.iter_lines():
                    told.append(line)
                    if line == "event: job":
                        came.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert came.wait(30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        watcher.join(30)
        assert not watcher.is_alive()
        assert "event: job" in told
        assert "event: end" not in told


@pytest.mark.full
def test_ready_units_are_handed_to_the_queue(tmp_path: Path, redis_url: str) -> None:
    from redis import Redis

    settings = settings_for(tmp_path)
    engine = open_database(settings)
    migrate(engine)
    AccessStore(engine, settings).ensure_project("default")
    JobStore(engine, settings).submit("default", NewJob(JobKind.AUDIT, {"seed": 0}, stages_of(JobKind.AUDIT)))
    engine.dispose()
    with service(settings, redis_url), Redis.from_url(redis_url) as queue:
        wait_until(lambda: queue.llen("cpu") > 0, "the message of the first unit")
        assert queue.llen("cpu") == 1
