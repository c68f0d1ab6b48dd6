"""A whole service for tests but for its API: database, artifact store, uploads, a dispatcher thread, worker processes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safer_engine import demo_data
from safer_engine.spec import AuditSpec
from service.infra.settings import Settings, load_settings
from service.infra.stores import ServiceStore, Stores
from service.infra.upload_files import PartReceipt, UploadFiles
from service.jobs.access import AccessStore
from service.jobs.database import migrate, open_database
from service.jobs.dispatcher import Dispatcher
from service.jobs.job_log import JobLogs
from service.jobs.model import FINAL_JOB_STATES, JobKind, JobRecord
from service.jobs.queue import Sender
from service.jobs.requests import NewJob
from service.jobs.stage_plan import stages_of
from service.jobs.store import JobStore
from service.upload_names import UploadFile, upload_name
from tests.helpers.servers import wait_until
from tests.helpers.tiny_model import build_reward_model

ROOT = Path(__file__).parents[2]
PROJECT = "default"
FAST = {
    "lease_seconds": 3.0,
    "heartbeat_seconds": 1.0,
    "resend_seconds": 2.0,
    "reconcile_seconds": 0.5,
    "dispatch_seconds": 0.1,
    "retry_seconds": 0.2,
    "terminate_seconds": 10.0,
    "max_failures": 20,
    "metrics_port": 0,
}
"""Settings under which a fault is noticed within seconds."""
SMALL: dict[str, Any] = {
    "sae": {"kind": "topk", "max_steps": 40, "min_steps": 40, "batch": 256, "k": 8},
    "causal": {"pairs": 12},
    "report": {"bootstrap": 100},
    "runtime": {"device": "cpu", "threads": 1},
}


class Workplace:
    """One service in one folder.

    Attributes:
        given: settings beside the defaults, as the worker processes get them.
    """

    def __init__(self, folder: Path, **given: object) -> None:
        self.folder = folder
        self.given: dict[str, object] = {
            "secret_pepper": "a pepper of tests",
            **FAST,
            "home": folder / "home",
            "device": "cpu",
            **given,
        }
        self.settings: Settings = load_settings(**self.given)
        self.engine = open_database(self.settings)
        migrate(self.engine)
        AccessStore(self.engine, self.settings).ensure_project(PROJECT)
        self.jobs = JobStore(self.engine, self.settings)
        self.stores = Stores(self.settings, self.engine)
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def store(self) -> ServiceStore:
        """The artifacts of the one project."""
        return self.stores.project(PROJECT)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process of this service."""
        named = {f"SAFER_{name.upper()}": environment_text(value) for name, value in self.given.items()}
        return {**os.environ, **named, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def upload(self, path: Path) -> str:
        """Upload a file or folder; its name in specs."""
        files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        root = path if path.is_dir() else path.parent
        uploads = UploadFiles(self.stores, PROJECT)
        listed = []
        for number, file in enumerate(files):
            data = file.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            uploads.put_part("u1", number, 0, [data], PartReceipt(len(data), digest))
            listed.append(UploadFile(file.relative_to(root).as_posix(), digest, len(data)))
        return upload_name(uploads.complete("u1", listed))

    def submit(self, document: Mapping[str, Any], kind: JobKind = JobKind.AUDIT, **more: Any) -> JobRecord:
        """Store a job as the API would."""
        spec = AuditSpec.model_validate(document).model_dump(mode="json") if kind is JobKind.AUDIT else dict(document)
        return self.jobs.submit(PROJECT, NewJob(kind, spec, stages_of(kind), **more)).job

    @contextmanager
    def dispatching(self) -> Iterator[Dispatcher]:
        """A dispatcher in a thread."""
        stop = threading.Event()
        sender = Sender(self.settings)
        logs = JobLogs(self.engine, self.jobs, self.stores)
        dispatcher = Dispatcher(self.jobs, sender, self.settings, logs.write_missing)
        thread = threading.Thread(target=dispatcher.run, args=(stop,))
        thread.start()
        try:
            yield dispatcher
        finally:
            stop.set()
            thread.join()
            sender.close()

    def worker(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a worker process, in a group of its own; it is killed by `close`."""
        with (self.folder / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "workers", *arguments],
                cwd=ROOT, env={**self.environment, **environment}, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        return process

    def wait(self, job: JobRecord, seconds: float = 120.0) -> JobRecord:
        """The job once it has ended."""
        wait_until(lambda: self.jobs.job(job.id).state in FINAL_JOB_STATES, f"the job ended\n{self.log()}", seconds)
        return self.jobs.job(job.id)

    def log(self) -> str:
        """What workers wrote."""
        path = self.folder / "worker.log"
        return path.read_text(errors="replace")[-6000:] if path.is_file() else ""

    def close(self) -> None:
        """End every process that this started."""
        for process in self._processes:
            stop_group(process, signal.SIGKILL)
        self.engine.dispose()


def stop_group(process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM, seconds: float = 20.0) -> int:
    """Signal a process and its children; its exit code."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    return process.wait(seconds)


def children_of(pid: int) -> list[int]:
    """Processes that a process has started and that are there still."""
    try:
        return [int(each) for task in Path(f"/proc/{pid}/task").iterdir() for each in (task / "children").read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> set[int]:
    """Processes below a process, at any depth."""
    below = set(children_of(pid))
    return below.union(*map(descendants, below))


def working_child(worker: int) -> int | None:
    """The process that computes a stage for a worker, if there is one just now."""
    for server in children_of(worker):
        try:
            command = Path(f"/proc/{server}/cmdline").read_text()
        except OSError:
            continue
        if "forkserver" in command:
            return next(iter(children_of(server)), None)
    return None


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def material(folder: Path, pairs: int = 40) -> dict[str, Path]:
    """A tiny reward model, a dataset and an evaluation set."""
    demo_data.write_demo(folder, demo_data.generate(seed=1, n_groups=pairs))
    build_reward_model(folder / "rm", "llama", width=16, blocks=2)
    return {"model": folder / "rm", "dataset": folder / "preferences.jsonl", "evaluation": folder / "evaluation.jsonl"}


def audit_of(workplace: Workplace, files: Mapping[str, Path], **sections: Any) -> dict[str, Any]:
    """An audit spec that names uploads of the files."""
    return {
        **SMALL,
        "model": {"path": workplace.upload(files["model"])},
        "dataset": {"source": {"kind": "local", "path": workplace.upload(files["dataset"])}},
        "evaluation": {"source": {"kind": "local", "path": workplace.upload(files["evaluation"])}},
        **sections,
    }


def environment_text(value: object) -> str:
    """A setting as an environment variable holds it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
