"""The registry hook against a real MLflow server: a version is registered, audited, judged, and carries its verdict."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from service.jobs.model import JobRecord
from service.jobs.requests import JobQuery
from tests.helpers.deployment import Deployment
from tests.helpers.mlflow_server import Mlflow, mlflow_server
from tests.helpers.servers import LOCAL, Redis, wait_until
from tests.helpers.workplace import PROJECT, SMALL, material

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
SECRET = "a secret of tests, long enough"


def _policy(least: float) -> dict[str, Any]:
    fact = "evaluation.groups[axis=*].accuracy"
    rule = {"name": "right", "fact": fact, "min": least, "min_n": 1, "pass_when": "not_disproven", "on_inconclusive": "warn"}
    return {"version": 1, "name": f"at-least-{least:g}".replace(".", "-"), "rules": [rule]}


def _template(files: dict[str, Path]) -> dict[str, Any]:
    spec = {
        **SMALL,
        "dataset": {"source": {"kind": "local", "path": str(files["dataset"])}},
        "evaluation": {"source": {"kind": "local", "path": str(files["evaluation"])}, "min_pairs": 5},
    }
    lenient = {"spec": spec, "policy": _policy(0.0), "labels": {"from": "mlflow"}}
    return {
        "audits": [
            {"models": ["strict*"], "spec": spec, "policy": _policy(0.9999)},
            {"models": ["by-alias"], "on_created": False, "aliases": ["candidate"], "baseline_alias": "champion", **lenient},
            {"models": ["rm*", "rm with blanks, é & %"], **lenient},
        ]
    }


@dataclass
class World:
    """A registry, and a service that it tells of its versions."""

    mlflow: Mlflow
    service: Deployment
    model: Path

    def log_and_register(self, name: str) -> str:
        """A version of a registered model, whose files are a run's artifacts."""
        source = self.mlflow.log_folder(self.model)
        return self.mlflow.register(name, source, source.split("/")[1])

    def jobs_of(self, name: str, version: str) -> list[JobRecord]:
        """The audits of a version."""
        labels = {"mlflow.model": name, "mlflow.version": version}
        return list(self.service.jobs.find(PROJECT, JobQuery(labels=labels)).items)

    def deliver(self, event: dict[str, Any], delivery: str = "", secret: str = SECRET, age: int = 0) -> httpx.Response:
        """Send a webhook as MLflow does."""
        body = json.dumps(event).encode()
        sent_as, at = delivery or str(uuid.uuid4()), str(int(time.time()) - age)
        mac = hmac.new(secret.encode(), f"{sent_as}.{at}.".encode() + body, hashlib.sha256).digest()
        headers = {
            "Content-Type": "application/json",
            "X-MLflow-Delivery-Id": sent_as,
            "X-MLflow-Timestamp": at,
            "X-MLflow-Signature": f"v1,{base64.b64encode(mac).decode()}",
        }
        return httpx.post(f"{self.service.url}/v1/hooks/mlflow", content=body, headers=headers, timeout=30)


def created(name: str, version: str) -> dict[str, Any]:
    """The event of a new version."""
    data: dict[str, Any] = {
        "name": name,
        "version": version,
        "source": "models:/m",
        "run_id": None,
        "tags": {},
        "description": None,
    }
    return {"entity": "model_version", "action": "created", "timestamp": "2026-01-01T00:00:00+00:00", "data": data}


@pytest.fixture(scope="module")
def world(redis: Redis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("mlflow")
    registry = mlflow_server(folder)
    files = material(folder / "files", pairs=60)
    template = folder / "template.yaml"
    template.write_text(yaml.safe_dump(_template(files)), encoding="utf-8")
    service = Deployment(
        folder / "service",
        broker_url=redis.url,
        mlflow_url=registry.url,
        mlflow_secret=SECRET,
        mlflow_template=template,
        allowed_networks=f"{LOCAL}/32",
        allowed_sources=f"upload:,{folder / 'files'}/",
        public_url="https://audits.example.org",
    )
    try:
        service.start()
        registry.webhook(f"{service.url}/v1/hooks/mlflow", SECRET)
        yield World(registry, service, files["model"])
    finally:
        service.close()
        registry.stop()


def test_a_registered_version_is_audited_judged_and_tagged(world: World) -> None:
    version = world.log_and_register("rm")
    tags = world.mlflow.wait_tags("rm", version, state="done")
    (job,) = world.jobs_of("rm", version)
    assert tags["safer_audit.verdict"] == "pass"
    assert tags["safer_audit.audit"] == job.id
    assert tags["safer_audit.url"] == f"https://audits.example.org/audits/{job.id}"
    assert tags["safer_audit.policy"].startswith("at-least-0@")
    assert tags["safer_audit.baseline"] == "none"
    assert "safer_audit.error" not in tags
    assert (job.verdict or {})["outcome"] == "pass"
    assert (job.verdict or {})["gate"] == tags["safer_audit.gate"]
    assert job.labels == {"from": "mlflow", "mlflow.model": "rm", "mlflow.version": version}
    assert job.spec["model"]["path"].startswith("upload:")


def test_another_policy_by_the_name_of_the_model(world: World) -> None:
    version = world.log_and_register("strict-rm")
    assert world.mlflow.wait_tags("strict-rm", version, state="done")["safer_audit.verdict"] == "fail"


def test_an_alias_starts_an_audit_against_the_champion(world: World) -> None:
    first = world.log_and_register("by-alias")
    assert "safer_audit.state" not in world.mlflow.tags("by-alias", first)
    world.mlflow.set_alias("by-alias", "candidate", first)
    tags = world.mlflow.wait_tags("by-alias", first, state="done")
    assert tags["safer_audit.baseline"] == "none: no version holds the alias champion"
    world.mlflow.set_alias("by-alias", "champion", first)
    second = world.log_and_register("by-alias")
    world.mlflow.set_alias("by-alias", "candidate", second)
    tags = world.mlflow.wait_tags("by-alias", second, state="done")
    assert tags["safer_audit.baseline"] == f"version {first} (champion)"
    (job,) = world.jobs_of("by-alias", second)
    (before,) = world.jobs_of("by-alias", first)
    assert job.labels["mlflow.alias"] == "candidate"
    assert (job.verdict or {})["baseline"] == before.id


def test_deliveries_that_come_again_make_one_job(world: World) -> None:
    version = world.log_and_register("rm with blanks, é & %")
    first = world.mlflow.wait_tags("rm with blanks, é & %", version, state="done")
    event = created("rm with blanks, é & %", version)
    answers = [world.deliver(event, "a-delivery-that-is-tried-again") for _ in range(3)]
    assert [(answer.status_code, answer.json()["state"]) for answer in answers] == [
        (202, "accepted"),
        (200, "duplicate"),
        (200, "duplicate"),
    ]

    def judged_again() -> bool:
        tags = world.mlflow.tags("rm with blanks, é & %", version)
        return tags["safer_audit.state"] == "done" and tags["safer_audit.gate"] != first["safer_audit.gate"]

    wait_until(judged_again, "the version is judged again")
    assert len(world.jobs_of("rm with blanks, é & %", version)) == 1


def test_what_mlflow_did_not_sign_is_refused(world: World) -> None:
    event = created("rm-forged", "1")
    assert world.deliver(event, secret="another secret, long enough").status_code == 401
    assert world.deliver(event, age=3600).status_code == 401
    bare = httpx.post(f"{world.service.url}/v1/hooks/mlflow", json=event, timeout=30)
    assert (bare.status_code, bare.json()["code"]) == (401, "not_authenticated")
    assert world.jobs_of("rm-forged", "1") == []


def test_a_version_that_is_not_there_and_events_of_others_do_nothing(world: World) -> None:
    assert world.deliver(created("rm-nowhere", "7")).status_code == 202
    assert world.deliver(created("other", "1")).json()["state"] == "ignored"
    prompt = {**created("rm", "1"), "entity": "prompt_version"}
    assert world.deliver(prompt).json() == {"state": "ignored", "reason": "nothing is done about prompt_version.created"}


def test_files_that_cannot_be_read_are_told_of(world: World, tmp_path: Path) -> None:
    version = world.mlflow.register("rm-elsewhere", "s3://a-bucket/rm")
    tags = world.mlflow.wait_tags("rm-elsewhere", version, state="refused", verdict="error")
    assert "not among the allowed sources" in tags["safer_audit.error"]
    shutil.copytree(world.model, tmp_path / "rm")
    (tmp_path / "rm" / "model.safetensors").rename(tmp_path / "rm" / "pytorch_model.bin")
    source = world.mlflow.log_folder(tmp_path / "rm")
    version = world.mlflow.register("rm-pickle", source, source.split("/")[1])
    tags = world.mlflow.wait_tags("rm-pickle", version, state="refused", verdict="error")
    assert "safe_serialization=True" in tags["safer_audit.error"]


def test_a_verdict_outlives_mlflow_and_the_service(world: World) -> None:
    version = world.log_and_register("rm-late")
    world.mlflow.wait_tags("rm-late", version, state="running")
    (job,) = world.jobs_of("rm-late", version)
    world.mlflow.stop(signal.SIGKILL)
    try:
        world.service.wait(job.id)
        world.service.api.stop(signal.SIGKILL)
        world.service.start_api()
    finally:
        world.mlflow.start()
    tags = world.mlflow.wait_tags("rm-late", version, state="done")
    assert tags["safer_audit.verdict"] == "pass"
    assert len(world.jobs_of("rm-late", version)) == 1
