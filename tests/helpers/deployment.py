"""A whole service as an operator runs it: the API and workers as processes of the programs, set up and used by the CLI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from sqlalchemy import Engine

from service.client import AuditClient
from service.embedded import free_port
from service.infra.settings import Settings, load_settings
from service.infra.stores import Stores
from service.jobs.attachments import AttachmentStore
from service.jobs.database import open_database
from service.jobs.model import FINAL_JOB_STATES, FINAL_UNIT_STATES, JobRecord, JobState, StageState
from service.jobs.store import JobStore
from tests.helpers.servers import LOCAL, Server, wait_until
from tests.helpers.workplace import FAST, PROJECT, ROOT, SMALL, environment_text, stop_group

_PATIENCE = 400.0
_PREPARE = "prepare"


class Deployment:
    """A service with a database of its own; every process writes its log to `<name>.log` in `folder`.

    Attributes:
        given: settings beside the defaults, as every process gets them.
        token: an admin's key.
        api: the API's process; stop, kill and start it at will.
        workers: the workers' processes.
    """

    def __init__(self, folder: Path, **given: object) -> None:
        """Make the schema and the first key, with the commands that an operator types; start nothing."""
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.folder = folder
        self.given: dict[str, object] = {
            **FAST,
            "home": folder / "home",
            "database_url": f"sqlite:///{folder / 'service.db'}",
            "store_url": str(folder / "artifacts"),
            "secret_pepper": "a pepper of tests, long enough",
            "host": LOCAL,
            "port": port,
            "device": "cpu",
            "requests_per_minute": 1_000_000,
            **given,
        }
        self.url = f"http://{LOCAL}:{port}"
        self.workers: list[subprocess.Popen[bytes]] = []
        self.run("migrate")
        made = self.run("admin", "keys", "create", "--name", "first", "--role", "admin", "--json")
        self.token: str = json.loads(made.stdout)["secret"]
        self.api = Server("api", [sys.executable, "-m", "service"], port, folder, self.environment)
        self.settings: Settings = load_settings(**self.given)
        self.engine: Engine = open_database(self.settings)
        self.jobs = JobStore(self.engine, self.settings)

    @property
    def environment(self) -> dict[str, str]:
        """Of every process of the service, and of its operator."""
        named = {f"SAFER_{name.upper()}": environment_text(value) for name, value in self.given.items()}
        return {**_bare(), **named}

    @property
    def client_environment(self) -> dict[str, str]:
        """Of someone who uses the service from elsewhere."""
        return {**_bare(), "HOME": str(self.folder), "SAFER_AUDIT_URL": self.url, "SAFER_AUDIT_TOKEN": self.token}

    def run(self, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command of the operator."""
        return _command(arguments, self.folder, {**self.environment, **environment}, code)

    def cli(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """A command of a client."""
        return _command(tuple(map(str, arguments)), self.folder, self.client_environment, code)

    def ask(self, *arguments: str | Path, code: int = 0) -> Any:
        """The answer to a client's command, as JSON."""
        return json.loads(self.cli(*arguments, "--json", code=code).stdout)

    def client(self) -> AuditClient:
        """The API as Python calls."""
        return AuditClient(self.url, self.token)

    def start(self, workers: int = 1) -> None:
        """Start the API, wait until it finds all it needs, and start workers."""
        self.start_api()
        for _ in range(workers):
            self.worker()

    def start_api(self, **environment: str) -> None:
        """Start the API and wait until `/readyz` is content."""
        self.api.environment = {**self.environment, **environment}
        self.api.start()
        wait_until(self.ready, f"the API is ready\n{self.logs()[-3000:]}")

    def ready(self) -> bool:
        """Whether the API finds all it needs."""
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/readyz", timeout=10) as answer:
            return bool(answer.status == 200)
        return False

    def worker(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a worker in a process group of its own."""
        log = (self.folder / f"worker-{len(self.workers)}.log").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-m", "workers", *arguments],
            cwd=self.folder, env={**self.environment, **environment}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        log.close()
        self.workers.append(process)
        return process

    def submit_flags(self, files: Mapping[str, Path], **sections: Any) -> tuple[str | Path, ...]:
        """Flags of `submit` for a small audit of files on this machine."""
        spec = self.folder / f"audit-{len(list(self.folder.glob('audit-*')))}.yaml"
        spec.write_text(yaml.safe_dump({**SMALL, **sections}), encoding="utf-8")
        flags: tuple[str | Path, ...] = ("-m", files["model"], "-d", files["dataset"], "--spec", spec)
        return (*flags, "-e", files["evaluation"]) if "evaluation" in files else flags

    def submit(self, files: Mapping[str, Path], **sections: Any) -> str:
        """Submit a small audit by the CLI; the job's id."""
        return self.cli("submit", *self.submit_flags(files, **sections)).stdout.strip()

    def open_stage(self, job_id: str) -> str | None:
        """The stage a job is in."""
        return next((row.name for row in self.jobs.stages(job_id) if row.state is StageState.OPEN), None)

    def wait_stage(self, job_id: str, stage: str) -> None:
        """Wait until a job is in a stage, or past it."""
        names = [row.name for row in self.jobs.stages(job_id)]

        def there() -> bool:
            now = self.open_stage(job_id)
            return self.jobs.job(job_id).state in FINAL_JOB_STATES or (now is not None and names.index(now) >= names.index(stage))

        wait_until(there, f"the job comes to {stage}\n{self.logs()[-3000:]}", _PATIENCE)

    def wait(self, job_id: str) -> JobRecord:
        """A job once it has ended."""
        try:
            wait_until(lambda: self.jobs.job(job_id).state in FINAL_JOB_STATES, f"job {job_id} ends", _PATIENCE)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.logs()[-6000:]}") from error
        return self.jobs.job(job_id)

    def logs(self) -> str:
        """What all processes wrote."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))

    def check_sound(self, *succeeded: str) -> None:
        """Jobs that are to succeed have, nothing is left under way, and every artifact is whole, as far as its last byte.

        Artifacts are read from the store itself, past the caches of the service.
        """
        for job_id in succeeded:
            job = self.wait(job_id)
            assert job.state is JobState.SUCCEEDED, (job.error, self.logs()[-6000:])
        for job in self.jobs.find(PROJECT).items:
            assert job.state in FINAL_JOB_STATES, job
            assert {unit.state for unit in self.jobs.units(job.id)} <= FINAL_UNIT_STATES
        contents = self._whole_artifacts()
        for job_id in succeeded:
            rows = self.jobs.stages(job_id)
            assert {row.state for row in rows} == {StageState.DONE}
            for row in rows:
                assert row.name == _PREPARE or contents[row.name, str(row.key)] == row.content_digest
            self.wait_log(job_id)

    def wait_log(self, job_id: str) -> None:
        """Wait until the log of a job that has ended is one of its files."""
        wait_until(lambda: bool(AttachmentStore(self.engine).attached(job_id)), "the job's log is written")

    def _whole_artifacts(self) -> dict[tuple[str, str], str]:
        """The content of each committed artifact, once each, with every file read and its digest verified."""
        with TemporaryDirectory(dir=self.folder) as fresh:
            settings = self.settings.model_copy(update={"home": Path(fresh)})
            store = Stores(settings, self.engine).project(PROJECT)
            found: dict[tuple[str, str], str] = {}
            for each in store.committed():
                assert (each.stage, each.key) not in found, "two manifests for one key"
                stored = store.read(each.stage, each.key)
                for name in stored.manifest.files:
                    assert stored.path(name).is_file()  # asking for the path verifies the digest
                found[each.stage, each.key] = stored.manifest.content_digest
            store.close()
        return found

    def close(self) -> None:
        """End every process that this started."""
        for worker in self.workers:
            stop_group(worker, signal.SIGKILL)
        self.api.stop(signal.SIGKILL)
        self.engine.dispose()


def _bare() -> dict[str, str]:
    """This environment without anything that tells of another service."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SAFER_") or name == "SAFER_REQUIRE_ALL"}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _command(
    arguments: tuple[str, ...], folder: Path, environment: dict[str, str], code: int
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=_PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == code, (arguments, done.returncode, done.stdout[-3000:], done.stderr[-3000:])
    return done
