"""The whole API in one process, over SQLite and a local store: two projects, a key for every role, jobs that have ended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient

from safer_engine.store import ManifestDraft, digest_bytes
from service.http.app import create_app
from service.http.services import Services, open_services
from service.jobs.access import Principal, Role
from service.jobs.database import migrate
from service.jobs.model import FINAL_JOB_STATES, JobKind, JobRecord, Lease, StagePart
from service.jobs.requests import Finished, NewJob
from service.jobs.stage_plan import stages_of
from tests.helpers.databases import memory_folder, settings_for

HOST = "http://127.0.0.1"
PROJECTS = ("default", "other")
SPEC: dict[str, Any] = {"model": {"path": "org/rm"}, "dataset": {"source": {"kind": "hub", "path": "org/pairs"}}}
TRAINING: dict[str, Any] = {"base": "org/base", "dataset": {"source": {"kind": "hub", "path": "org/pairs"}}}
SCRIPT, STYLE = "document.title = 'ran';", "body { color: rgb(1, 2, 3); }"
REPORT = f"<!doctype html><html><head><style>{STYLE}</style></head><body>report<script>{SCRIPT}</script></body></html>"
CANARY = "a text of the dataset that belongs to nobody else"


def edit_line(pair_id: str, action: str, suspicion: float | None, **given: Any) -> dict[str, Any]:
    """A line of edits.jsonl."""
    line = {
        "pair_id": pair_id, "content_digest": digest_bytes(pair_id.encode()), "group": "g", "axis": "safety", "status": "scored",
        "reason": None, "action": action, "suspicion": suspicion, "suspicion_kind": "rank" if suspicion is not None else None,
        "signals": {"latents": 0.5}, "pair_score": 0.1, "reward_margin": -0.2,
        "evidence": [{"latent_id": 3, "contribution": -1.5}],
    }  # fmt: skip
    return line | given


EDITS = [
    edit_line("p-0", "keep", 0.2),
    edit_line("p/1", "drop", 0.99),
    edit_line('"suspicion": 1', "review", 0.9),
    edit_line("p-3", "keep", None, status="not_scored", reason="too_long"),
    edit_line("p-4", "drop", 0.97, axis="chat"),
    edit_line("é ✓", "flip", 0.95),
]


def report_document() -> dict[str, Any]:
    """Of a report.json, what the pages read."""
    texts = {name: {"text": f"{CANARY} <b>{name}</b>", "omitted": 2} for name in ("prompt", "chosen", "rejected")}
    return {"edits": {"pairs": [{"pair_id": "p/1", **texts}, {"pair_id": "p-4", "prompt": None}]}}


def payloads() -> dict[str, dict[str, bytes]]:
    """What each stage of a finished audit holds: stage → file → content."""
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in EDITS)
    return {
        "report": {"report.html": REPORT.encode(), "report.json": json.dumps(report_document()).encode(), "report.md": b"# R\n"},
        "edits": {"edits.jsonl": lines.encode()},
        "sae": {"sae.json": b"{}", "sae.safetensors": bytes(range(256)) * 64, "curve.arrow": b"ARROW1"},
        "activations": {"shard-00000.safetensors": b"x" * 100},
        "pairs": {},
    }


@dataclass
class HttpWorld:
    """A running application, and who may ask it."""

    app: FastAPI
    services: Services
    keys: dict[tuple[str, str], str] = field(default_factory=dict)
    principals: dict[tuple[str, str], Principal] = field(default_factory=dict)

    def client(self, role: str | None = "admin", project: str = "default", **given: Any) -> TestClient:
        """A client with the key of a role (None: without one)."""
        headers = {"Authorization": f"Bearer {self.keys[project, role]}"} if role else {}
        return TestClient(self.app, base_url=HOST, headers=headers, follow_redirects=False, client=("10.1.2.3", 5000), **given)

    def submit(self, project: str = "default", kind: JobKind = JobKind.AUDIT, **given: Any) -> JobRecord:
        """A queued job."""
        spec = TRAINING if kind is JobKind.TRAIN_RM else SPEC
        return self.services.jobs.submit(project, NewJob(kind, spec, stages_of(kind), **given)).job

    def finished(self, project: str = "default", **given: Any) -> JobRecord:
        """An audit that has ended, of just the stages that have payloads."""
        stages = tuple(StagePart(name, "cpu") for name in payloads())
        return self.finish(self.services.jobs.submit(project, NewJob(JobKind.AUDIT, SPEC, stages, **given)).job)

    def lease(self, job: JobRecord) -> Lease:
        """The open unit of a job, in the hands of a worker."""
        unit = self.services.jobs.units(job.id)[-1]
        assert self.services.jobs.mark_sent(unit.id)
        lease = self.services.jobs.lease(unit.id, "worker")
        assert lease is not None
        return lease

    def finish(self, job: JobRecord, contents: Mapping[str, Mapping[str, bytes]] | None = None) -> JobRecord:
        """Run a job to its end, with these payloads."""
        given = payloads() if contents is None else contents
        while self.services.jobs.job(job.id).state not in FINAL_JOB_STATES:
            lease = self.lease(job)
            files = given.get(lease.stage)
            finished = Finished() if files is None else self.commit(job, lease.stage, files)
            self.services.jobs.finish(lease, finished)
        return self.services.jobs.job(job.id)

    def commit(self, job: JobRecord, stage: str, files: Mapping[str, bytes]) -> Finished:
        """Commit an artifact of a job's stage."""
        key = digest_bytes(f"{job.id}/{stage}".encode())
        store = self.services.store(job.project)
        with store.open_work(stage, key) as work:
            for name, content in files.items():
                with work.publish(name) as path:
                    path.write_bytes(content)
            stored = store.commit(stage, key, work, ManifestDraft(1, "Test", {}))
        size = sum(map(len, files.values()))
        return Finished("computed", key, stored.manifest.content_digest, bytes=size)


@contextmanager
def http_world(folder: Path | None = None, **settings: Any) -> Iterator[HttpWorld]:
    """The application; its folder is removed afterwards."""
    with memory_folder() as made:
        settings.setdefault("broker_url", "redis://127.0.0.1:1/0")
        settings.setdefault("requests_per_minute", 10_000_000)
        services = open_services(settings_for(folder or made, **settings))
        migrate(services.engine)
        world = HttpWorld(create_app(services.settings, services), services)
        for project in PROJECTS:
            services.access.ensure_project(project)
            for role in Role:
                made_key = services.access.create_key(project, f"{role} of {project}", [role], "test")
                world.keys[project, role] = made_key.secret
                principal = services.access.authenticate(made_key.secret)
                assert principal is not None
                world.principals[project, role] = principal
        yield world
        services.stopping.set()
        services.close()
        shutil.rmtree(services.settings.folder / "artifacts", ignore_errors=True)
