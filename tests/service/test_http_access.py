"""Who may do what: every route × every role × a foreign project × no key."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from service.http.auth import COOKIE, SESSION_SECONDS, new_session
from service.jobs.access import Role
from service.jobs.gate_model import GateRecord, NewGate
from service.jobs.model import JobRecord
from service.jobs.uploads import UploadRecord
from service.upload_names import UploadFile
from tests.helpers.http_world import SPEC, TRAINING, HttpWorld

SUBMIT, READ, REVIEW, REDTEAM, ADMIN = Role
DIGEST = hashlib.sha256(b"abc").hexdigest()
JOB, UPLOAD, GATE = "/v1/audits/{job_id}", "/v1/uploads/{upload_id}", "/v1/gates/{gate_id}"
PART = f"{UPLOAD}/files/{{index}}/parts/{{number}}"


@dataclass(frozen=True)
class Route:
    """A route, the roles that suffice beside admin, and a request that it takes."""

    method: str
    path: str
    roles: frozenset[Role]
    request: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def route(method: str, path: str, *roles: Role, **request: Any) -> Route:
    return Route(method, path, frozenset((*roles, ADMIN)), request)


OPEN = {("GET", "/healthz"), ("GET", "/readyz"), ("POST", "/v1/hooks/mlflow")}
"""Without a key; what the last one is sent carries a signature in its place."""
VERIFICATION = {
    **SPEC, "retraining": {"base": "org/base"}, "evaluation": {"source": {"kind": "hub", "path": "org/held"}},
}  # fmt: skip
ROUTES = [
    route("POST", "/v1/audits", SUBMIT, json={"spec": SPEC}),
    route("POST", "/v1/verifications", SUBMIT, json={"spec": VERIFICATION}),
    route("POST", "/v1/trainings", SUBMIT, json={"spec": TRAINING}),
    route("POST", "/v1/drills", REDTEAM, json={"spec": {**TRAINING, "evaluation": TRAINING["dataset"]}}),
    route("POST", "/v1/comparisons", SUBMIT, json={"a": "one", "b": "another"}),
    route("GET", "/v1/audits", SUBMIT, READ, REVIEW),
    route("GET", "/v1/models/{digest}/audits", SUBMIT, READ, REVIEW),
    route("GET", "/v1/datasets/{digest}/audits", SUBMIT, READ, REVIEW),
    route("GET", "/v1/models/{digest}/history", READ),
    route("GET", "/v1/history", READ, params={"label": "alias=production"}),
    route("GET", JOB, SUBMIT, READ, REVIEW),
    route("GET", f"{JOB}/events", SUBMIT, READ, REVIEW, params={"follow": "false"}),
    route("GET", f"{JOB}/artifacts", READ),
    route("GET", f"{JOB}/artifacts/{{name}}", READ),
    route("GET", f"{JOB}/report", READ),
    route("GET", f"{JOB}/edits", READ, REVIEW),
    route("GET", f"{JOB}/edits/{{pair_id}}", READ, REVIEW),
    route("PATCH", f"{JOB}/edits/{{pair_id}}", REVIEW, json={"action": "keep"}),
    route("GET", f"{JOB}/edits/export", REVIEW),
    route("POST", f"{JOB}/cancel", SUBMIT),
    route("POST", f"{JOB}/retry", SUBMIT),
    route("DELETE", JOB, SUBMIT),
    route("POST", "/v1/gates", SUBMIT, json={"submission": {"spec": SPEC}}),
    route("GET", "/v1/gates", SUBMIT, READ, REVIEW),
    route("GET", GATE, SUBMIT, READ, REVIEW),
    route("POST", "/v1/uploads", SUBMIT, json={"kind": "dataset", "files": [{"path": "a", "size": 3, "sha256": DIGEST}]}),
    route("GET", UPLOAD, SUBMIT),
    route("PUT", PART, SUBMIT, content=b"abc", headers={"X-Content-SHA256": DIGEST}),
    route("GET", f"{PART}/presigned", SUBMIT),
    route("POST", PART, SUBMIT, json={"etag": "x", "size": 3, "sha256": DIGEST}),
    route("POST", f"{UPLOAD}/complete", SUBMIT),
    route("DELETE", UPLOAD, SUBMIT),
    route("GET", "/v1/keys"),
    route("POST", "/v1/keys", json={"name": "n", "roles": ["read"]}),
    route("DELETE", "/v1/keys/{key_id}"),
    route("GET", "/v1/projects"),
    route("POST", "/v1/projects", json={"name": "third"}),
    route("GET", "/v1/log"),
    route("GET", "/metrics"),
    route("GET", "/v1/me", SUBMIT, READ, REVIEW, REDTEAM),
]


@dataclass(frozen=True)
class Things:
    """What the project `default` owns."""

    job: JobRecord
    upload: UploadRecord
    key_id: str
    gate: GateRecord

    def path(self, template: str) -> str:
        """A template with their names in it."""
        names = {"job_id": self.job.id, "upload_id": self.upload.id, "key_id": self.key_id, "digest": DIGEST}
        return template.format(**names, gate_id=self.gate.id, name="report.md", pair_id="p-0", index=0, number=0)


@pytest.fixture
def things(world: HttpWorld) -> Things:
    services = world.services
    upload = services.uploads.create("default", "dataset", [UploadFile("a", DIGEST, 3)], "test")
    key = services.access.create_key("default", "spare", [Role.READ], "test")
    job = world.finished()
    gate = services.gates.create("default", NewGate({}, "default", DIGEST), job.id).gate
    return Things(job, upload, key.key.id, gate)


def ask(world: HttpWorld, things: Things, asked: Route, role: str | None, project: str = "default") -> int:
    client = world.client(role, project)
    return int(client.request(asked.method, things.path(asked.path), **asked.request).status_code)


def test_every_route_has_its_row(world: HttpWorld) -> None:
    schema = world.client().get("/openapi.json").json()
    published = {(method.upper(), path) for path, item in schema["paths"].items() for method in item}
    assert published == {(each.method, each.path) for each in ROUTES} | OPEN


@pytest.mark.parametrize("asked", ROUTES, ids=str)
def test_roles_of_a_route(world: HttpWorld, things: Things, asked: Route) -> None:
    before = world.services.jobs.job(things.job.id)
    denied = [role for role in Role if role not in asked.roles]
    assert [ask(world, things, asked, role) for role in denied] == [403] * len(denied)
    assert world.services.jobs.job(things.job.id) == before
    for role in asked.roles:
        assert ask(world, things, asked, role) not in (401, 403, 422, 500), role


@pytest.mark.parametrize("asked", ROUTES, ids=str)
def test_without_a_key(world: HttpWorld, things: Things, asked: Route) -> None:
    world.services.strangers._buckets.clear()
    path = things.path(asked.path)
    for headers in (
        {},
        {"Authorization": "Bearer sk-safer-" + "A" * 43},
        {"Authorization": "Basic YTpi"},
        {"Authorization": "Bearer"},
    ):
        given = asked.request | {"headers": asked.request.get("headers", {}) | headers}
        response = world.client(None).request(asked.method, path, **given)
        assert (response.status_code, response.json()["code"]) == (401, "not_authenticated")
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("asked", [each for each in ROUTES if "_id}" in each.path], ids=str)
def test_things_of_another_project_are_not_there(world: HttpWorld, things: Things, asked: Route) -> None:
    assert ask(world, things, asked, "admin", "other") == 404
    unknown = things.path(asked.path)
    for own in (things.job.id, things.upload.id, things.key_id, things.gate.id):
        unknown = unknown.replace(own, "0" * 26)
    ours = world.client("admin", "other").request(asked.method, things.path(asked.path), **asked.request).json()
    nobodys = world.client("admin", "other").request(asked.method, unknown, **asked.request).json()
    assert (ours["code"], ours["hint"]) == (nobodys["code"], nobodys["hint"])


def test_lists_hold_the_projects_own_things_only(world: HttpWorld, things: Things) -> None:
    assert things.job.id not in world.client("admin", "other").get("/v1/audits?limit=200").text
    assert things.job.id not in world.client("admin", "other").get("/v1/log?limit=500").text
    assert things.key_id not in world.client("admin", "other").get("/v1/keys").text
    assert world.client("admin", "other").get("/v1/gates?limit=200").json()["items"] == []
    assert [found["name"] for found in world.client("admin", "other").get("/v1/projects").json()["items"]] == ["other"]


def test_only_admins_of_the_default_project_reach_beyond_it(world: HttpWorld) -> None:
    own, foreign = world.client("admin"), world.client("admin", "other")
    key = {"name": "n", "roles": ["read"]}
    assert foreign.post("/v1/projects", json={"name": "fourth"}).status_code == 403
    assert foreign.post("/v1/keys", json=key | {"project": "default"}).status_code == 403
    assert foreign.get("/metrics").status_code == 403
    assert own.post("/v1/projects", json={"name": "fourth", "max_running": 2}).json()["max_running"] == 2
    assert own.post("/v1/projects", json={"name": "fourth"}).status_code == 409
    made = own.post("/v1/keys", json=key | {"project": "fourth", "days": 1}).json()
    assert (made["project"], made["secret"][:9]) == ("fourth", "sk-safer-")
    assert made["secret"] not in own.get("/v1/log?limit=500").text


@pytest.mark.parametrize("name", ["", "A", "-a", "a_b", "a/b", "a" * 64, "ä"])
def test_names_that_cannot_be_a_projects(world: HttpWorld, name: str) -> None:
    assert world.client("admin").post("/v1/projects", json={"name": name}).status_code == 422


def test_a_revoked_or_expired_key_ends_at_once(world: HttpWorld) -> None:
    admin = world.client("admin")
    made = admin.post("/v1/keys", json={"name": "n", "roles": ["read"]}).json()
    client = world.client(None)
    headers = {"Authorization": f"Bearer {made['secret']}"}
    principal = world.services.access.authenticate(made["secret"])
    assert principal is not None
    cookies = {COOKIE: new_session(world.services, principal)}
    assert client.get("/v1/me", headers=headers).json()["roles"] == ["read"]
    assert world.client(None, cookies=cookies).get("/v1/me").status_code == 200
    assert admin.delete(f"/v1/keys/{made['id']}").json()["revoked"] is not None
    assert client.get("/v1/me", headers=headers).status_code == 401
    assert world.client(None, cookies=cookies).get("/v1/me").status_code == 401
    short = world.services.access.create_key("default", "short", [Role.READ], "test", 1e-6)
    assert client.get("/v1/me", headers={"Authorization": f"Bearer {short.secret}"}).status_code == 401


def test_a_session_lasts_by_the_clock_of_the_database(world: HttpWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two APIs may tell different times."""
    cookies = {COOKIE: new_session(world.services, world.principals["default", "admin"])}
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 2 * SESSION_SECONDS)
    assert world.client(None, cookies=cookies).get("/v1/me").status_code == 200
    monkeypatch.setattr("service.http.auth.SESSION_SECONDS", -1)
    cookies = {COOKIE: new_session(world.services, world.principals["default", "admin"])}
    assert world.client(None, cookies=cookies).get("/v1/me").status_code == 401


def test_a_session_reads_the_api_and_changes_nothing(world: HttpWorld, things: Things) -> None:
    cookie = new_session(world.services, world.principals["default", "admin"])
    client = world.client(None, cookies={COOKIE: cookie})
    assert client.get(f"/v1/audits/{things.job.id}").status_code == 200
    assert client.delete(f"/v1/audits/{things.job.id}").status_code == 401
    assert client.post("/v1/audits", json={"spec": SPEC}).status_code == 401
    payload, _, signature = cookie.partition(".")
    for forged in (f"{payload}.{'0' * 64}", f"{payload}x.{signature}", f"{payload}.", payload, ".", f"é.{signature}"):
        header = {b"Cookie": f"{COOKIE}={forged}".encode()}
        assert world.client(None).get("/v1/me", headers=header).status_code == 401
