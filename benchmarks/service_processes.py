"""A whole service for a benchmark: broker, database, API and workers as processes that may be killed, on free ports."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Engine

from service.embedded import free_port
from service.infra.settings import Settings, load_settings
from service.jobs.access import DEFAULT_PROJECT, AccessStore, Limits, Role
from service.jobs.database import migrate, open_database

LOCAL = "127.0.0.1"
_PATIENCE = 90.0


@dataclass
class Deployment:
    """A running service.

    Attributes:
        settings: of all its processes.
        url, token: for clients.
        kills: processes killed so far, by what they were.
    """

    settings: Settings
    engine: Engine
    url: str
    token: str
    environment: dict[str, str]
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    kills: dict[str, int] = field(default_factory=dict)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def start(self, name: str) -> None:
        """Start the API (`api`) or a worker (any other name)."""
        module = "service" if name == "api" else "workers"
        log = (self.folder / f"{name}.log").open("ab")
        command = [sys.executable, "-m", module]
        environment = {**self.environment, "PGAPPNAME": name}
        self.processes[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        log.close()

    def wait_ready(self) -> None:
        """Wait until the API says that all it needs is there."""
        end = time.monotonic() + _PATIENCE
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as answer:
                if answer.status == 200:
                    return
            if time.monotonic() > end:
                raise TimeoutError(f"the API is not ready; see {self.folder / 'api.log'}")
            time.sleep(0.2)

    def keep_killing(self, every: float, seed: int = 0) -> threading.Thread:
        """Kill -9 a random worker, or a random stage process of one, every few seconds, and start what was killed again."""
        thread = threading.Thread(target=self._kill_loop, args=(every, random.Random(seed)), daemon=True)
        thread.start()
        return thread

    def _kill_loop(self, every: float, rng: random.Random) -> None:
        while not self._stopping.wait(rng.uniform(0.5 * every, 1.5 * every)):
            names = [name for name in self.processes if name != "api"]
            name = rng.choice(names)
            worker = self.processes[name]
            below = stage_processes(worker.pid)
            if below and rng.random() < 0.5:
                self._kill("stage process", rng.choice(below))
            else:
                self._kill("worker", worker.pid)
                worker.wait()
                self.start(name)

    def _kill(self, what: str, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills[what] = self.kills.get(what, 0) + 1

    def stop_killing(self) -> None:
        """Let everything live from now on."""
        self._stopping.set()

    def stop(self) -> None:
        """End all processes."""
        self._stopping.set()
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        self.engine.dispose()


def stage_processes(pid: int) -> list[int]:
    """Processes below a worker that run Python: its forkserver's children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _parent(int(entry.name)) == pid:
            child = int(entry.name)
            found += [child, *stage_processes(child)]
    return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return -1


@contextmanager
def deployment(folder: Path, broker_url: str, workers: int, database_url: str | None = None, **more: str) -> Iterator[Deployment]:
    """A service with so many workers in a folder of its own; SQLite unless a database is named; `more` are other settings."""
    port = free_port()
    given = {
        "SAFER_HOME": str(folder),
        "SAFER_HOST": LOCAL,
        "SAFER_PORT": str(port),
        "SAFER_BROKER_URL": broker_url,
        "SAFER_SECRET_PEPPER": secrets.token_urlsafe(32),
        "SAFER_METRICS_PORT": "0",
        "SAFER_LEASE_SECONDS": "6",
        "SAFER_HEARTBEAT_SECONDS": "1.5",
        "SAFER_RESEND_SECONDS": "5",
        "SAFER_RECONCILE_SECONDS": "2",
        "SAFER_RETRY_SECONDS": "0.5",
        "SAFER_MAX_FAILURES": "20",
        "SAFER_REQUESTS_PER_MINUTE": "1000000",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **({"SAFER_DATABASE_URL": database_url} if database_url else {}),
        **{f"SAFER_{name.upper()}": value for name, value in more.items()},
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SAFER_")} | given
    os.environ.update(given)
    settings = load_settings()
    folder.mkdir(parents=True, exist_ok=True)
    engine = open_database(settings)
    migrate(engine)
    access = AccessStore(engine, settings)
    access.ensure_project(DEFAULT_PROJECT)
    access.set_limits(DEFAULT_PROJECT, Limits(max_running=64, max_queued=1_000_000), "benchmark")
    token = access.create_key(DEFAULT_PROJECT, "benchmark", [Role.ADMIN], "benchmark").secret
    running = Deployment(settings, engine, f"http://{LOCAL}:{port}", token, environment, folder)
    try:
        running.start("api")
        running.wait_ready()
        for index in range(workers):
            running.start(f"worker-{index}")
        yield running
    finally:
        running.stop()
