"""Jobs over HTTP: submitting, finding, watching, stopping."""

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest

from service.http import streaming
from service.http.streaming import Seen, Watch, event_stream
from service.jobs.model import JobError, JobKind, JobState
from tests.helpers.http_world import SPEC, TRAINING, HttpWorld, http_world


@pytest.fixture(scope="module")
def world() -> Iterator[HttpWorld]:
    with http_world() as made:
        yield made


def events_of(text: str) -> list[tuple[str, dict[str, object], str | None]]:
    """Kind, data and id of each event on the wire."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(":"))
        if "data" in fields:
            found.append((fields["event"], json.loads(fields["data"]), fields.get("id")))
    return found


def test_an_audit_is_stored_as_the_engine_understands_it(world: HttpWorld) -> None:
    body = {
        "spec": {"model": "org/rm@main", "dataset": "org/pairs#test", "sae": {"k": 7}},
        "labels": {"team": "a"},
        "priority": 3,
    }
    response = world.client("submit").post("/v1/audits", json=body)
    assert response.status_code == 201
    job = response.json()
    assert response.headers["location"] == f"/v1/audits/{job['id']}"
    assert job["spec"]["model"]["path"] == "org/rm@main"
    assert job["spec"]["dataset"]["source"] == {
        "kind": "hub",
        "path": "org/pairs",
        "revision": None,
        "name": None,
        "split": "test",
    }
    assert job["spec"]["sae"]["kind"] == "topk"
    assert (job["spec"]["sae"]["k"], job["priority"], job["labels"]) == (7, 3, {"team": "a"})
    assert [stage["name"] for stage in job["stages"]][:3] == ["prepare", "pairs", "activations"]
    assert (job["state"], job["stage"], job["submitted_by"]) == (
        "queued",
        "prepare",
        world.principals["default", "submit"].key_id,
    )


def test_the_paper_preset_lies_under_what_is_given(world: HttpWorld) -> None:
    spec = {**SPEC, "preset": "paper", "sae": {"k": 9}}
    found = world.client("submit").post("/v1/audits", json={"spec": spec}).json()["spec"]
    assert (found["sae"]["k"], found["sae"]["loss"], found["hook"]["positions"]) == (9, "nmse", "sentence_ends")
    trained = world.client("submit").post("/v1/trainings", json={"spec": {**TRAINING, "preset": "paper"}}).json()
    assert (trained["kind"], trained["spec"]["recipe"]["batch"]) == ("train-rm", 128)
    assert [stage["name"] for stage in trained["stages"]] == ["prepare", "training"]


@pytest.mark.parametrize(
    ("spec", "path", "said"),
    [
        ({**SPEC, "sae": {"q": 1}}, "spec.sae.q", "known here: aux_k"),
        ({**SPEC, "sae": {"k": 0}}, "spec.sae.k", "greater than 0"),
        ({**SPEC, "labels": {"labeller": {"kind": "oracle"}}}, "spec.labels.labeller", "oracle"),
        ({"dataset": SPEC["dataset"]}, "spec.model", "required"),
        ({**SPEC, "dataset": {"source": {"kind": "hub"}}}, "spec.dataset.source.path", "required"),
        ({**SPEC, "evaluation": {"source": {"kind": "hub", "path": "a/b"}, "sample": 1}}, "spec.evaluation.sample", "2"),
    ],
)
def test_a_wrong_spec_is_told_field_by_field(world: HttpWorld, spec: object, path: str, said: str) -> None:
    response = world.client("submit").post("/v1/audits", json={"spec": spec})
    assert response.status_code == 422
    problem = response.json()
    assert problem["code"] == "request_invalid"
    assert [item for item in problem["errors"] if item["path"] == path and said in item["message"]], problem["errors"]


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"spec": SPEC, "colour": 1}, "colour"),
        ({"spec": SPEC, "priority": "high"}, "priority"),
        ({"spec": SPEC, "priority": True}, "priority"),
        ({"spec": SPEC, "priority": 101}, "priority"),
        ({"spec": SPEC, "labels": {"-": "x"}}, "labels.-"),
        ({"spec": SPEC, "labels": {"a": 1}}, "labels.a"),
        ({"spec": [], "labels": {}}, "spec"),
        ({"spec": SPEC, "gpu_seconds_budget": 0}, "gpu_seconds_budget"),
        ([], ""),
    ],
)
def test_a_wrong_request_names_the_field(world: HttpWorld, body: object, path: str) -> None:
    response = world.client("submit").post("/v1/audits", json=body)
    assert response.status_code == 422
    assert path in [item["path"] for item in response.json()["errors"]]


@pytest.mark.parametrize(
    "spec",
    [
        {**SPEC, "model": {"path": "/etc"}},
        {**SPEC, "model": {"path": "file:///etc"}},
        {**SPEC, "dataset": "/etc/passwd"},
        {**SPEC, "dataset": {"source": {"kind": "local", "path": "../x.jsonl"}}},
        {**SPEC, "dataset": {"source": {"kind": "memory"}}},
        {**SPEC, "dataset": {"source": {"kind": "local", "path": "upload:" + "0" * 64}}},
        {**SPEC, "runtime": {"trust_remote_code": True}},
        {**SPEC, "labels": {"rubric": "/etc/hosts"}},
        {**SPEC, "labels": {"labeller": {"kind": "chat_api", "base_url": "http://169.254.169.254/", "model": "m"}}},
    ],
)
def test_what_the_operator_does_not_allow_is_refused(world: HttpWorld, spec: object) -> None:
    response = world.client("submit").post("/v1/audits", json={"spec": spec})
    assert (response.status_code, response.json()["code"]) == (422, "source_not_allowed")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/x", "http://localhost:99/", "http://[::1]/", "http://10.0.0.1/", "http://169.254.169.254/latest",
            "http://2130706433/", "ftp://example.com/", "http://user:pw@example.com/", "http://[::ffff:127.0.0.1]/", "nonsense"],
)  # fmt: skip
def test_callbacks_lead_to_public_addresses_only(world: HttpWorld, url: str) -> None:
    response = world.client("submit").post("/v1/audits", json={"spec": SPEC, "callback_url": url})
    assert (response.status_code, response.json()["code"]) == (422, "source_not_allowed")


def test_the_same_request_under_one_key_is_one_job(world: HttpWorld) -> None:
    client = world.client("submit")
    headers = {"Idempotency-Key": "once"}
    first = client.post("/v1/audits", json={"spec": SPEC, "labels": {"a": "1", "b": "2"}}, headers=headers)
    again = client.post("/v1/audits", json={"labels": {"b": "2", "a": "1"}, "spec": SPEC}, headers=headers)
    other = client.post("/v1/audits", json={"spec": SPEC}, headers=headers)
    training = client.post("/v1/trainings", json={"spec": TRAINING}, headers=headers)
    foreign = world.client("submit", "other").post("/v1/audits", json={"spec": SPEC}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    assert (other.status_code, other.json()["code"], training.status_code) == (409, "conflict", 409)
    assert foreign.status_code == 201
    assert foreign.json()["id"] != first.json()["id"]
    assert client.post("/v1/audits", json={"spec": SPEC}, headers={"Idempotency-Key": "ü".encode()}).status_code == 422


def test_an_upload_that_the_project_lacks_is_refused_when_submitted(world: HttpWorld) -> None:
    spec = {**SPEC, "model": {"path": "upload:" + "a" * 64}}
    response = world.client("submit").post("/v1/audits", json={"spec": spec})
    assert (response.status_code, response.json()["code"]) == (422, "source_not_allowed")
    assert "a" * 64 in response.json()["detail"]


def test_lists_are_filtered_and_paged(world: HttpWorld) -> None:
    jobs = [world.submit(labels={"run": "page", "n": str(number)}).id for number in range(5)]
    client = world.client("read")
    first = client.get("/v1/audits", params={"label": "run=page", "limit": 2}).json()
    second = client.get("/v1/audits", params={"label": "run=page", "limit": 2, "cursor": first["next"]}).json()
    last = client.get("/v1/audits", params={"label": "run=page", "limit": 2, "cursor": second["next"]}).json()
    assert [job["id"] for page in (first, second, last) for job in page["items"]] == jobs[::-1]
    assert last["next"] is None
    both = client.get("/v1/audits", params=[("label", "run=page"), ("label", "n=3")]).json()["items"]
    assert [job["id"] for job in both] == [jobs[3]]
    params = {"label": "run=page", "state": "queued", "kind": "audit", "stage": "prepare"}
    assert len(client.get("/v1/audits", params=params).json()["items"]) == 5
    assert client.get("/v1/audits", params={"label": "run=page", "state": "failed"}).json()["items"] == []
    late = client.get("/v1/audits", params={"created_from": "2999-01-01T00:00:00Z"}).json()["items"]
    assert late == []


@pytest.mark.parametrize(
    "query", ["state=done", "limit=0", "limit=201", "label=nothing", "cursor=%21", "cursor=QUFBQQ", "created_from=yesterday",
              "created_from=2020-01-01T00:00:00", "created_from=0001-01-01T00:00:00%2B14:00", "colour=red", "kind=x"],
)  # fmt: skip
def test_a_wrong_filter_is_refused(world: HttpWorld, query: str) -> None:
    assert world.client("read").get(f"/v1/audits?{query}").status_code in (400, 422)


@pytest.mark.parametrize("place", ["0001-01-01T00:00:00+14:00|x", "2020-01-01T00:00:00+00:00|\0", "2020-01-01T00:00:00+00:00|é"])
def test_a_cursor_that_was_made_up_is_refused(world: HttpWorld, place: str) -> None:
    import base64

    cursor = base64.urlsafe_b64encode(place.encode()).decode().rstrip("=")
    assert world.client("read").get("/v1/audits", params={"cursor": cursor}).status_code == 422


def test_a_job_shows_where_it_stands_and_how_it_ended(world: HttpWorld) -> None:
    client, job = world.client("read"), world.submit(priority=100)
    assert client.get(f"/v1/audits/{job.id}").json()["queue_position"] == 1
    lease = world.lease(job)
    world.services.jobs.progress(lease, 3, 12, "rows")
    seen = client.get(f"/v1/audits/{job.id}").json()
    assert (seen["state"], seen["stage"], seen["progress"], seen["queue_position"]) == ("running", "prepare", 0.25, None)
    assert seen["eta_seconds"] is None, "nothing is planned yet, and what one second of work says is not much"
    world.services.jobs.fail(lease, JobError("model_refused", "no head", "train one"))
    ended = client.get(f"/v1/audits/{job.id}").json()
    assert (ended["state"], ended["error"]["code"], ended["error"]["hint"]) == ("failed", "model_refused", "train one")
    assert ended["eta_seconds"] is None


def test_cancel_retry_and_delete(world: HttpWorld) -> None:
    client, job = world.client("submit"), world.submit()
    path = f"/v1/audits/{job.id}"
    assert client.delete(path).status_code == 409
    assert client.post(f"{path}/retry").status_code == 409
    assert client.post(f"{path}/cancel").json()["state"] == "cancelled"
    assert client.post(f"{path}/cancel").status_code == 200
    again = client.post(f"{path}/retry").json()
    assert (again["state"], again["attempt"]) == ("queued", 2)
    client.post(f"{path}/cancel")
    assert client.delete(path).status_code == 204
    assert client.get(path).status_code == 404
    assert client.delete(path).status_code == 404


def test_events_are_told_from_where_a_client_left_off(world: HttpWorld) -> None:
    job = world.finish(world.submit(kind=JobKind.TRAIN_RM), {})
    client = world.client("read")
    response = client.get(f"/v1/audits/{job.id}/events")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    events = events_of(response.text)
    kinds = [(kind, data.get("data", {}).get("state")) for kind, data, _ in events]  # type: ignore[union-attr]
    assert kinds[0] == ("job", "queued")
    assert kinds[-2] == ("job", "succeeded")
    assert events[-1][:2] == ("end", {"state": "succeeded"})
    ids = [int(found) for *_, found in events if found]
    assert ids == sorted(set(ids))
    again = events_of(client.get(f"/v1/audits/{job.id}/events", headers={"Last-Event-ID": str(ids[-2])}).text)
    assert [found for *_, found in again] == [str(ids[-1]), None]
    assert len(events_of(client.get(f"/v1/audits/{job.id}/events?after={ids[-1]}").text)) == 1


def test_events_of_a_running_job_come_as_they_happen(world: HttpWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LONGEST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(streaming, "HEARTBEAT_SECONDS", 0.02)
    job = world.submit(kind=JobKind.TRAIN_RM)
    lease = world.lease(job)

    def work() -> None:
        world.services.jobs.progress(lease, 1, 4, "steps")
        world.services.jobs.fail(lease, JobError("x", "y"))

    worker = threading.Timer(0.4, work)
    worker.start()
    text = world.client("submit").get(f"/v1/audits/{job.id}/events").text
    worker.join()
    told = events_of(text)
    assert ": still here" in text
    assert told[-1][:2] == ("end", {"state": "failed"})
    assert ("job", "failed") in [(kind, data.get("data", {}).get("state")) for kind, data, _ in told]  # type: ignore[union-attr]


def test_progress_is_told_once_for_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "FIRST_PAUSE_SECONDS", 0.0)
    shares: list[float | None] = [1, 1, 2, None, 2, 3]
    looks = [Seen(JobState.RUNNING, (), {"stage": "sae", "done": share} if share else None) for share in shares]
    looks.append(Seen(JobState.SUCCEEDED, (), None))
    watch = Watch(look=lambda _after: looks.pop(0), allowed=lambda: True, stopping=threading.Event())

    async def read() -> str:
        return "".join([text async for text in event_stream(watch, 0)])

    told = events_of(asyncio.run(read()))
    assert [data.get("done") for kind, data, _ in told if kind == "progress"] == [1, 2, 2, 3]
    assert told[-1] == ("end", {"state": "succeeded"}, None)


def test_a_stream_ends_when_the_service_stops_or_the_key_is_revoked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LONGEST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(streaming, "RECHECK_SECONDS", 0.02)
    with http_world() as world:
        job = world.submit()
        key = world.principals["default", "read"].key_id
        timer = threading.Timer(0.2, lambda: world.services.access.revoke_key("default", key, "test"))
        timer.start()
        assert "event: end" not in world.client("read").get(f"/v1/audits/{job.id}/events").text
        timer.join()
        timer = threading.Timer(0.2, world.services.stopping.set)
        timer.start()
        assert "event: end" not in world.client("submit").get(f"/v1/audits/{job.id}/events").text
        timer.join()


def test_one_key_may_not_open_streams_without_end(world: HttpWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "STREAMS_PER_KEY", 1)
    key = world.principals["default", "read"].key_id
    job = world.finish(world.submit(kind=JobKind.TRAIN_RM), {})
    with world.services.streams.one(key):
        response = world.client("read").get(f"/v1/audits/{job.id}/events")
        assert (response.status_code, response.json()["code"]) == (429, "too_many_requests")
    assert world.client("read").get(f"/v1/audits/{job.id}/events").status_code == 200


def test_jobs_are_found_by_the_digest_of_what_they_used(world: HttpWorld) -> None:
    digest = "d" * 64
    job = world.submit(inputs={"model": digest})
    client = world.client("read")
    assert [found["id"] for found in client.get(f"/v1/models/{digest}/audits").json()["items"]] == [job.id]
    assert client.get(f"/v1/models/{'e' * 64}/audits").json()["items"] == []
    assert world.client("read", "other").get(f"/v1/models/{digest}/audits").json()["items"] == []


def test_a_project_that_is_full_is_told_so() -> None:
    with http_world(default_max_queued=1) as world:
        client = world.client("submit")
        assert client.post("/v1/audits", json={"spec": SPEC}).status_code == 201
        response = client.post("/v1/audits", json={"spec": SPEC})
        assert (response.status_code, response.json()["code"]) == (429, "quota_exceeded")


def test_a_jobs_gpu_budget_is_at_most_the_projects(world: HttpWorld) -> None:
    world.client("admin").post("/v1/projects", json={"name": "thrifty", "gpu_seconds_per_job": 100})
    made = world.client("admin").post("/v1/keys", json={"name": "n", "roles": ["submit"], "project": "thrifty"}).json()
    client, headers = world.client(None), {"Authorization": f"Bearer {made['secret']}"}
    for asked, given in ((None, 100), (50, 50), (1e6, 100)):
        body = {"spec": SPEC, "gpu_seconds_budget": asked}
        assert client.post("/v1/audits", json=body, headers=headers).json()["gpu_seconds_budget"] == given
    assert world.client("submit").post("/v1/audits", json={"spec": SPEC}).json()["gpu_seconds_budget"] is None
