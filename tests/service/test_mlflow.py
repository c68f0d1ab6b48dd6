"""MLflow's webhooks: who may send them, what they ask for, where a version's files are, and what is told of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from safer_engine.errors import InputRefused, SpecError
from service.errors import NotAuthenticated, RequestInvalid, SourceNotAllowed
from service.mlflow.audits import RegistryAudits
from service.mlflow.deliveries import VersionEvent, delivery_id, read_event
from service.mlflow.layout import model_files, walk
from service.mlflow.places import Direct, Place, Proxied, place_of
from service.mlflow.registry import ProxyFile
from service.mlflow.store import VersionState
from service.mlflow.tags import TagWriter, tags_of
from service.mlflow.template import read_template
from tests.helpers.http_world import SPEC, HttpWorld, http_world
from tests.helpers.scripted_server import Asked, Reply, ScriptedServer
from tests.helpers.servers import LOCAL

SECRET = "whsec_a secret of tests"
BODY = b'{"entity": "model_version", "action": "created"}'
HEADERS = {
    "X-MLflow-Delivery-Id": "3a81f6ac-2001-44fa-8282-a3f2ef541f97",
    "X-MLflow-Timestamp": "1795381193",
    # printf '%s' '<id>.<time>.<body>' | openssl dgst -sha256 -hmac "$SECRET" -binary | base64
    "X-MLflow-Signature": "v1,u31ihoKRtOJCA1/gLdGAcYO0Nktz14G/mrSsEXU0zHo=",
}
NOW = 1795381193.0
CREATED: dict[str, Any] = {"name": "rm", "version": "1", "source": "models:/m-1", "run_id": None, "tags": {}, "description": None}


def event(entity: str = "model_version", action: str = "created", **data: Any) -> bytes:
    """An event as MLflow 3.17 writes it."""
    at = "2026-11-22T20:59:53.000046+00:00"
    return json.dumps({"entity": entity, "action": action, "timestamp": at, "data": {**CREATED, **data}}).encode()


def test_a_delivery_that_mlflow_signed() -> None:
    assert delivery_id(SECRET, HEADERS, BODY, NOW) == HEADERS["X-MLflow-Delivery-Id"]


@pytest.mark.parametrize(
    ("headers", "body", "now"),
    [
        ({}, BODY + b" ", NOW),
        ({"X-MLflow-Delivery-Id": "another"}, BODY, NOW),
        ({"X-MLflow-Timestamp": "1795381194"}, BODY, NOW),
        ({"X-MLflow-Signature": ""}, BODY, NOW),
        ({"X-MLflow-Signature": "v1,"}, BODY, NOW),
        ({"X-MLflow-Signature": "v1,é"}, BODY, NOW),
        ({"X-MLflow-Timestamp": "now"}, BODY, NOW),
        ({"X-MLflow-Timestamp": "²"}, BODY, NOW),
        ({"X-MLflow-Delivery-Id": ""}, BODY, NOW),
        ({"X-MLflow-Delivery-Id": "a.b"}, BODY, NOW),
        ({}, BODY, NOW + 301),
        ({}, BODY, NOW - 301),
    ],
)
def test_deliveries_that_are_refused(headers: dict[str, str], body: bytes, now: float) -> None:
    with pytest.raises(NotAuthenticated):
        delivery_id(SECRET, {**HEADERS, **headers}, body, now)


def test_what_events_ask_for() -> None:
    assert read_event(event()) == VersionEvent("rm", "1")
    assert read_event(event("model_version_alias", alias="champion")) == VersionEvent("rm", "1", "champion")
    assert read_event(event("model_version_tag", "set")) == "model_version_tag.set"
    assert isinstance(read_event(event()[:-1] + b', "workspace": "team"}'), str)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b"{", event(name=""), event(name="a\nb"), event(version="x"), event(version=1), event(name=None),
     event("model_version_alias"), b'{"entity": "model_version", "action": "created", "data": []}'],
)  # fmt: skip
def test_what_is_no_event(body: bytes) -> None:
    with pytest.raises(RequestInvalid):
        read_event(body)


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("mlflow-artifacts:/0/run/artifacts/model", Proxied("0/run/artifacts/model")),
        ("mlflow-artifacts://mlflow.example:5000/0/a%20b", Proxied("0/a b")),
        ("http://mlflow.example:5000/api/2.0/mlflow-artifacts/artifacts/0/x/", Proxied("0/x")),
        ("s3://bucket/key/model", Direct("s3://bucket/key/model")),
        ("/models/rm", Direct("/models/rm")),
        ("file:///models/a%20b", Direct("/models/a b")),
    ],
)
def test_places_that_can_be_read(uri: str, place: Place) -> None:
    assert place_of(uri, "http://mlflow.example:5000") == place


@pytest.mark.parametrize(
    "uri",
    ["mlflow-artifacts://elsewhere/0/x", "mlflow-artifacts:/", "mlflow-artifacts:/../x", "mlflow-artifacts:/a/%2e%2e/b",
     "mlflow-artifacts:/a//b", "mlflow-artifacts:/a\\b", "http://mlflow.example:5000/x", "https://elsewhere/model", "gs://b/k",
     "wasbs://c@a/b", "dbfs:/x", "file://host/x", "relative/x", "", "models:/rm/1", "mlflow-artifacts:/a%00b", "file:///a%00b",
     "/a\x00b", "s3://b/\ud800"],
)  # fmt: skip
def test_places_that_are_refused(uri: str) -> None:
    with pytest.raises(SourceNotAllowed):
        place_of(uri, "http://mlflow.example:5000")


def listed(*paths: str) -> list[ProxyFile]:
    """Files below the folder `r`."""
    return [ProxyFile(f"r/{path}", 1, False) for path in paths]


def names(files: Sequence[str], folder: str | None = None) -> dict[str, str]:
    """Which files are the model: name → where it lies."""
    return {file.name: file.source for file in model_files(listed(*files), "r", folder)}


def test_the_folder_nearest_to_the_root_is_the_model() -> None:
    plain = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "old/config.json", "old/a.safetensors"]
    assert names(plain) == {name: f"r/{name}" for name in plain[:3]}
    assert set(names(plain, "old/")) == {"config.json", "a.safetensors"}
    assert set(names(["MLmodel", "python_model.pkl", "artifacts/hf/config.json", "artifacts/hf/a.safetensors"])) == {
        "config.json",
        "a.safetensors",
    }


def test_what_the_transformers_flavour_took_apart_is_put_together() -> None:
    flavour = ["MLmodel", "model/config.json", "model/model.safetensors", "model/.cache", "model/training_args.bin",
               "components/tokenizer/tokenizer.json", "components/tokenizer/tokenizer_config.json", "LICENSE.txt"]  # fmt: skip
    assert names(flavour) == {
        "config.json": "r/model/config.json",
        "model.safetensors": "r/model/model.safetensors",
        "tokenizer.json": "r/components/tokenizer/tokenizer.json",
        "tokenizer_config.json": "r/components/tokenizer/tokenizer_config.json",
    }


@pytest.mark.parametrize(
    ("files", "folder", "told"),
    [
        ([], None, "no folder"),
        (["config.json", "pytorch_model.bin"], None, "no folder"),
        (["a/config.json", "a/m.safetensors", "b/config.json", "b/m.safetensors"], None, "several folders hold a model: a, b"),
        (["config.json", "m.safetensors"], "../x", "safer_audit.folder"),
    ],
)
def test_folders_that_are_no_model(files: list[str], folder: str | None, told: str) -> None:
    with pytest.raises(InputRefused, match=told):
        names(files, folder)


def test_too_many_artifacts_are_not_walked() -> None:
    with pytest.raises(InputRefused, match="over 2000"):
        walk(lambda folder: [ProxyFile(f"{folder}/{number}", 1, False) for number in range(2001)], "r")
    endless = walk(lambda folder: [ProxyFile(f"{folder}/x", None, True), ProxyFile(f"{folder}/f", 1, False)], "r")
    assert len(endless) == 6


def test_a_template_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "template.yaml"
    wrong = {
        "": "valid dictionary",
        "audits: []": "audits",
        "audits: [{spec: {}, polisy: x}]": "polisy",
        "{": "YAML",
        "audits: [{spec: {}, policy: nowhere.yaml}]": "nowhere",
        "audits: [{spec: {}, policy: {version: 2}}]": "policy",
    }
    for text, told in wrong.items():
        path.write_text(text)
        with pytest.raises(SpecError, match=told):
            read_template(path)
    path.unlink()
    with pytest.raises(SpecError, match="cannot be read"):
        read_template(path)


def test_the_first_entry_that_fits_counts(tmp_path: Path) -> None:
    path = tmp_path / "template.yaml"
    entries = [{"models": ["a*"], "aliases": ["candidate"], "on_created": False, "spec": {}}, {"models": ["*"], "spec": {}}]
    path.write_text(yaml.safe_dump({"audits": entries}))
    template = read_template(path)
    one, other = template.entry("abc"), template.entry("b")
    assert one is not None
    assert other is not None
    assert [one.wants(None), one.wants("candidate"), one.wants("other")] == [False, True, False]
    assert [other.wants(None), other.wants("any")] == [True, True]


class Standing:
    """What a registry has, for a `ScriptedServer` to answer from: one version whose files are in S3."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.order: list[str] = []
        self.away = False
        self.created = 7
        self.place = "s3://allowed/rm"
        self.listing: Callable[[], Reply] = Reply

    def __call__(self, asked: Asked) -> Reply:
        """The answer to a request."""
        if self.away:
            return Reply(503)
        if asked.path.endswith("/model-versions/get"):
            tags = [{"key": key, "value": value} for key, value in self.tags.items()]
            version = {"source": "s3://allowed/rm", "creation_timestamp": self.created, "status": "READY", "tags": tags}
            return Reply(200, json.dumps({"model_version": version}).encode())
        if asked.path.endswith("/get-download-uri"):
            return Reply(200, json.dumps({"artifact_uri": self.place}).encode())
        if asked.path.endswith("/set-tag"):
            given = json.loads(asked.body)
            self.tags[given["key"]] = given["value"]
            self.order.append(given["key"])
            return Reply(200, b"{}")
        if asked.path.endswith("/delete-tag"):
            self.tags.pop(json.loads(asked.body)["key"], None)
            return Reply(200, b"{}")
        return self.listing() if asked.path.endswith("/mlflow-artifacts/artifacts") else Reply(404, b"{}")


@contextmanager
def hooked(tmp_path: Path, **entry: Any) -> Iterator[tuple[HttpWorld, Standing]]:
    """The API with a registry behind it."""
    template = tmp_path / "template.yaml"
    spec = {name: value for name, value in SPEC.items() if name != "model"}
    template.write_text(yaml.safe_dump({"audits": [{"spec": spec, **entry}]}))
    standing = Standing()
    with ScriptedServer(otherwise=standing) as server, http_world(
        mlflow_url=server.url, mlflow_secret=SECRET, mlflow_template=template, allowed_networks=(f"{LOCAL}/32",),
        allowed_sources=("hub:", "s3://allowed"),
    ) as world:  # fmt: skip
        yield world, standing


def steps(world: HttpWorld) -> None:
    """Do what is to be done now."""
    hook = world.services.mlflow
    assert hook is not None
    audits, tags = RegistryAudits(world.services, hook), TagWriter(hook.versions, hook.registry)
    while audits.step() or tags.step():
        pass


def test_a_version_walks_to_its_end_and_an_audit_that_fails_is_told_of(tmp_path: Path) -> None:
    with hooked(tmp_path) as (world, standing):
        hook, jobs = world.services.mlflow, world.services.jobs
        assert hook is not None
        hook.versions.receive("d1", VersionEvent("rm", "1", "champion"))
        steps(world)
        (job,) = jobs.find("default").items
        assert job.spec["model"]["path"] == "s3://allowed/rm"
        assert job.labels == {"mlflow.model": "rm", "mlflow.version": "1", "mlflow.alias": "champion"}
        assert standing.tags["safer_audit.verdict"] == "pending"
        jobs.request_cancel("default", job.id, "test")
        steps(world)
        assert standing.tags["safer_audit.state"] == "failed"
        assert standing.tags["safer_audit.verdict"] == "error"
        assert standing.tags["safer_audit.error"] == "cancelled"
        assert standing.order[-2:] == ["safer_audit.verdict", "safer_audit.state"]
        hook.versions.receive("d2", VersionEvent("rm", "1"))
        steps(world)
        assert len(jobs.find("default").items) == 2, "what failed is audited again when it is asked for again"
        assert "safer_audit.error" not in standing.tags


def test_a_death_between_storing_and_submitting_makes_one_job(tmp_path: Path) -> None:
    with hooked(tmp_path) as (world, _standing):
        hook, jobs = world.services.mlflow, world.services.jobs
        assert hook is not None
        hook.versions.receive("d1", VersionEvent("rm", "1"))
        steps(world)
        found = hook.versions.find("rm", "1")
        assert found is not None
        (job,) = jobs.find("default").items
        assert hook.versions.move(found, found.state.__class__.WAITING, job_id=None)
        steps(world)
        assert [each.id for each in jobs.find("default").items] == [job.id]


@pytest.mark.parametrize("state", [VersionState.WAITING, VersionState.AUDITING, VersionState.JUDGING])
def test_a_model_that_is_registered_anew_meanwhile_is_audited_itself(tmp_path: Path, state: VersionState) -> None:
    with hooked(tmp_path) as (world, standing):
        hook, jobs = world.services.mlflow, world.services.jobs
        assert hook is not None
        hook.versions.receive("d1", VersionEvent("rm", "1"))
        steps(world)
        (job,) = jobs.find("default").items
        found = hook.versions.find("rm", "1")
        assert found is not None
        assert hook.versions.move(found, state)
        standing.created, standing.tags = 8, {}
        hook.versions.receive("d2", VersionEvent("rm", "1"))
        jobs.request_cancel("default", job.id, "test")
        steps(world)
        (other,) = (each for each in jobs.find("default").items if each.id != job.id)
        assert standing.tags["safer_audit.audit"] == other.id
        assert standing.tags["safer_audit.verdict"] == "pending"


def test_tags_of_a_model_that_is_gone_are_not_given_to_another_of_its_name(tmp_path: Path) -> None:
    with hooked(tmp_path) as (world, standing):
        hook = world.services.mlflow
        assert hook is not None
        hook.versions.receive("d1", VersionEvent("rm", "1"))
        steps(world)
        found = hook.versions.find("rm", "1")
        assert found is not None
        assert hook.versions.move(found, VersionState.ENDED, tags_of("done", "pass"))
        standing.created, standing.tags = 8, {}
        writer = TagWriter(hook.versions, hook.registry)
        assert writer.step()
        assert not writer.step()
        assert not standing.tags


def test_who_looks_through_many_folders_hears_that_it_is_to_end(tmp_path: Path) -> None:
    with hooked(tmp_path) as (world, standing):
        looked = []

        def folder_in_folder() -> Reply:
            looked.append(1)
            world.services.stopping.set()
            return Reply(200, b'{"files": [{"path": "more", "is_dir": true}]}')

        standing.place, standing.listing = "mlflow-artifacts:/0/x", folder_in_folder
        hook = world.services.mlflow
        assert hook is not None
        hook.versions.receive("d1", VersionEvent("rm", "1"))
        assert RegistryAudits(world.services, hook).step()
        assert len(looked) == 1
        found = hook.versions.find("rm", "1")
        assert found is not None
        assert found.state == "waiting"


def test_a_registry_that_is_away_is_waited_for(tmp_path: Path) -> None:
    with hooked(tmp_path) as (world, standing):
        hook = world.services.mlflow
        assert hook is not None
        standing.away = True
        hook.versions.receive("d1", VersionEvent("rm", "1"))
        steps(world)
        found = hook.versions.find("rm", "1")
        assert found is not None
        assert (found.state, found.attempts) == ("waiting", 1)
        assert not world.services.jobs.find("default").items


def test_an_entry_whose_spec_no_audit_can_have_stops_the_start(tmp_path: Path) -> None:
    with hooked(tmp_path, spec={"datasset": "x"}) as (world, _standing):
        assert world.services.mlflow is not None
        with pytest.raises(SpecError, match="SAFER_MLFLOW_TEMPLATE"):
            RegistryAudits(world.services, world.services.mlflow)


def test_the_route_is_not_there_where_no_registry_is_set_and_asks_for_a_signature_where_one_is(tmp_path: Path) -> None:
    with http_world() as world:
        assert world.client(None).post("/v1/hooks/mlflow", json={}).status_code == 404
    with hooked(tmp_path) as (world, _standing):
        answer = world.client("admin").post("/v1/hooks/mlflow", json={})
        assert (answer.status_code, answer.json()["code"]) == (401, "not_authenticated")


def test_a_tag_is_one_line_and_not_long() -> None:
    tags = tags_of("refused", "error", error="a\n\x00\ud800b" + "c" * 1000)
    error = tags["safer_audit.error"]
    assert error is not None
    assert error.startswith("a b")
    assert len(error) == 500
    assert tags["safer_audit.gate"] is None
