"""Gates over HTTP: posted, judged by the service, told; whatever goes wrong never passes."""

from __future__ import annotations

import base64
import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from safer_engine.gate.documents import read_audit
from safer_engine.gate.judge import judge
from safer_engine.gate.outputs import as_json
from safer_engine.gate.policy import load_policy
from service.gate_deliveries import Deliveries, GateCallbacks, gate_document
from service.gate_judge import GateJudge
from service.jobs.clock import utc_after
from service.jobs.database import writing
from service.jobs.deliveries import CALLBACK, OwedDelivery
from service.jobs.gate_model import AWAITED
from service.jobs.model import JobError, JobRecord
from service.jobs.tables import gate_deliveries, gates, jobs
from service.outbound import Outbound
from tests.helpers import gate_reports as made
from tests.helpers.http_world import SPEC, HttpWorld, http_world
from tests.service.test_http_pages import visit
from tests.service.test_outbound import LOOPBACK, documented_verify, receiver

ROWS = made.pairs(0.95, 300)
WORSE = made.pairs(0.7, 300)
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
POLICY = {"version": 1, "name": "mine", "rules": [{"name": "right", "fact": "evaluation.groups[axis=*].accuracy", "min": 0.8}]}


@pytest.fixture(scope="module")
def world() -> Iterator[HttpWorld]:
    with http_world(callback_secret=SECRET, gate_file_bytes=1 << 20) as running:
        yield running


@pytest.fixture
def fresh() -> Iterator[HttpWorld]:
    """A world of the test's own."""
    with http_world() as running:
        yield running


def judging(world: HttpWorld, **given: Any) -> GateJudge:
    services = world.services
    return GateJudge(services.gates, services.jobs, services.stores, services.settings, **given)


def judge_all(world: HttpWorld) -> None:
    """Judge whatever is due, of other tests too."""
    one = judging(world)
    while one.step():
        pass


def files(rows: list[made.Pair] | None) -> dict[str, dict[str, bytes]]:
    """What the stage `report` of an audit with this evaluation commits."""
    report = {"report.json": json.dumps(made.report(rows)).encode()}
    return {"report": report if rows is None else report | {"evaluation.jsonl": made.lines(rows)}}


def audited(world: HttpWorld, rows: list[made.Pair] | None, project: str = "default", **given: Any) -> JobRecord:
    return world.finish(world.submit(project, **given), files(rows))


def post(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/gates", json=body)
    assert response.status_code == 201, response.text
    found: dict[str, Any] = response.json()
    return found


def again(client: TestClient, gate: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = client.get(gate["links"]["self"]).json()
    return found


def test_an_audit_is_submitted_judged_and_shows_the_verdict(world: HttpWorld) -> None:
    client = world.client("submit")
    good = audited(world, ROWS, labels={"alias": "first"})
    asked = {"submission": {"spec": SPEC, "labels": {"team": "a"}}, "policy": POLICY, "baseline": "label:first"}
    response = client.post("/v1/gates", json=asked, headers={"Idempotency-Key": "k"})
    gate = response.json()
    assert (response.status_code, response.headers["location"]) == (201, f"/v1/gates/{gate['id']}")
    assert (gate["state"], gate["verdict"], gate["baseline"], gate["baseline_audit"]) == (
        "pending", None, "label:first", good.id
    )  # fmt: skip
    audited(world, ROWS, labels={"alias": "first"})  # what the label stands for later changes nothing
    judge_all(world)
    assert again(client, gate)["state"] == "pending"
    job = world.finish(world.services.jobs.job(gate["audit"]), files(WORSE))
    assert job.labels == {"team": "a"}
    judge_all(world)
    found = again(client, gate)
    assert (found["state"], found["verdict"], found["error"]) == ("decided", "fail", None)
    assert found["reason"] == "broken: right[axis=safety]"
    shown = client.get(f"/v1/audits/{job.id}").json()
    assert shown["verdict"] == {
        "outcome": "fail", "gate": gate["id"], "policy": "mine", "policy_digest": found["policy_digest"], "baseline": good.id
    }  # fmt: skip
    assert shown["verdict_reason"] == found["reason"]
    assert {each["id"]: each["verdict"] for each in client.get("/v1/audits").json()["items"]}[job.id] == shown["verdict"]
    replay = client.post("/v1/gates", json=asked, headers={"Idempotency-Key": "k"})
    assert (replay.status_code, replay.json()["id"]) == (200, gate["id"])
    other = client.post("/v1/gates", json=asked | {"policy": "default"}, headers={"Idempotency-Key": "k"})
    assert other.status_code == 409


@pytest.mark.parametrize("policy", ["default", "strict"])
def test_the_decision_is_what_the_command_line_prints(world: HttpWorld, policy: str) -> None:
    client = world.client("submit")
    audit, baseline = audited(world, WORSE), audited(world, ROWS)
    gate = post(client, audit=audit.id, policy=policy, baseline=baseline.id)
    judge_all(world)
    found = again(client, gate)
    ours, theirs = (read_audit(json.dumps(made.report(rows)).encode(), made.lines(rows), "it") for rows in (WORSE, ROWS))
    today = world.services.gates.record(gate["id"]).created.date()
    expected = as_json(judge(load_policy(policy), ours, theirs, today))
    assert world.services.gates.decision(gate["id"]) == expected
    assert json.dumps(found["decision"], indent=2) + "\n" == expected
    assert found["policy_digest"] == load_policy(policy).digest
    assert made.CANARY not in client.get(gate["links"]["self"]).text


def test_who_may_see_and_name_what(world: HttpWorld) -> None:
    own, foreign = audited(world, ROWS), audited(world, ROWS, "other", labels={"alias": "production"})
    client = world.client("submit")
    gate = post(client, audit=own.id)
    for body in (
        {"audit": foreign.id},
        {"audit": own.id, "baseline": foreign.id},
        {"audit": own.id, "baseline": "label:production"},
    ):
        assert client.post("/v1/gates", json=body).status_code == 404
    assert world.client("read").get(gate["links"]["self"]).status_code == 200
    assert world.client("read", "other").get(gate["links"]["self"]).status_code == 404
    assert world.client("read").post("/v1/gates", json={"audit": own.id}).status_code == 403


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "audit"),
        ({"audit": "0" * 26, "submission": {"spec": SPEC}}, "audit"),
        ({"audit": "nothing"}, "audit"),
        ({"submission": {"spec": {"model": {"path": "org/rm"}}}}, "spec.dataset"),
        ({"audit": "0" * 26, "policy": "mine"}, "policy"),
        ({"audit": "0" * 26, "policy": "/etc/passwd"}, "policy"),
        ({"audit": "0" * 26, "policy": {"version": 1, "rules": [{"name": "a", "fact": "x"}]}}, "policy.rules.0"),
        ({"audit": "0" * 26, "policy": 1}, "policy"),
        ({"audit": "0" * 26, "unknown": 1}, "unknown"),
    ],
)
def test_wrong_requests_name_the_field(world: HttpWorld, body: dict[str, Any], path: str) -> None:
    before = world.services.gates.find("default").items
    response = world.client("submit").post("/v1/gates", json=body)
    assert response.status_code == 422
    assert any(each["path"].startswith(path) for each in response.json()["errors"]), response.json()
    assert world.services.gates.find("default").items == before


@pytest.mark.parametrize("url", ["http://127.0.0.1/x", "ftp://example.org/", "http://10.0.0.1/"])
def test_callbacks_lead_to_public_addresses_only(world: HttpWorld, url: str) -> None:
    before = world.services.jobs.find("default").items
    response = world.client("submit").post("/v1/gates", json={"submission": {"spec": SPEC}, "callback_url": url})
    assert (response.status_code, response.json()["code"]) == (422, "source_not_allowed")
    assert world.services.jobs.find("default").items == before


def test_an_audit_that_fails_does_not_pass(world: HttpWorld) -> None:
    client = world.client("submit")
    gate = post(client, submission={"spec": SPEC})
    job = world.services.jobs.job(gate["audit"])
    world.services.jobs.fail(world.lease(job), JobError("dataset_refused", f"row 1: {made.CANARY}", ""))
    judge_all(world)
    found = again(client, gate)
    assert (found["verdict"], found["error"]["code"], found["decision"]) == ("inconclusive", "audit_failed", None)
    assert found["reason"] == "the audit failed (dataset_refused)"


def test_an_audit_that_is_cancelled_or_deleted_does_not_pass(world: HttpWorld) -> None:
    client = world.client("submit")
    cancelled, deleted = post(client, submission={"spec": SPEC}), post(client, audit=audited(world, ROWS).id)
    client.post(f"/v1/audits/{cancelled['audit']}/cancel")
    client.delete(f"/v1/audits/{deleted['audit']}")
    judge_all(world)
    assert again(client, cancelled)["error"]["code"] == "audit_cancelled"
    found = again(client, deleted)
    assert (found["verdict"], found["reason"]) == ("inconclusive", "the audit was deleted before the gate was judged")


def test_a_baseline_that_is_gone_is_not_left_out(world: HttpWorld) -> None:
    client = world.client("submit")
    baseline = audited(world, ROWS)
    gate = post(client, audit=audited(world, ROWS).id, baseline=baseline.id)
    client.delete(f"/v1/audits/{baseline.id}")
    judge_all(world)
    found = again(client, gate)
    assert (found["verdict"], found["reason"]) == ("inconclusive", "the baseline was deleted before the gate was judged")


def broken(rows: list[made.Pair] | None, **changes: bytes) -> dict[str, dict[str, bytes]]:
    return {"report": {**files(rows)["report"], **{name.replace("_", "."): content for name, content in changes.items()}}}


@pytest.mark.parametrize(
    ("contents", "code"),
    [
        ({}, "artifact_error"),
        ({"report": {"report.md": b"# R"}}, "artifact_error"),
        (broken(ROWS, report_json=b"{}"), "input_refused"),
        (broken(ROWS, report_json=b"[" * 100_000), "input_refused"),
        (broken(ROWS, evaluation_jsonl=b'{"margin": NaN}\n'), "input_refused"),
        (broken(ROWS, evaluation_jsonl=made.lines(WORSE)), "input_refused"),
        (broken(ROWS, evaluation_jsonl=b" " * (1 << 21)), "too_large"),
        (broken(ROWS, report_json=b" " * (1 << 21)), "too_large"),
    ],
)
def test_files_that_cannot_be_judged(world: HttpWorld, contents: dict[str, dict[str, bytes]], code: str) -> None:
    client = world.client("submit")
    gate = post(client, audit=world.finish(world.submit(), contents).id)
    judge_all(world)
    found = again(client, gate)
    assert (found["verdict"], found["error"]["code"], found["decision"]) == ("inconclusive", code, None)


def test_a_fact_that_no_report_has_does_not_pass(world: HttpWorld) -> None:
    client = world.client("submit")
    policy = {"version": 1, "rules": [{"name": "slip", "fact": "evaluation.groups.acuracy", "min": 0.1}]}
    gate = post(client, audit=audited(world, ROWS).id, policy=policy)
    judge_all(world)
    assert (again(client, gate)["verdict"], again(client, gate)["error"]["code"]) == ("inconclusive", "spec_invalid")


def test_a_file_that_was_damaged_does_not_pass(fresh: HttpWorld) -> None:
    client = fresh.client("submit")
    gate = post(client, audit=audited(fresh, ROWS).id)
    blobs = fresh.services.settings.folder / "artifacts" / "blobs"
    for path in blobs.rglob("*"):
        if path.is_file() and path.read_bytes().startswith(b'{"schema_version"'):
            path.chmod(0o600)
            path.write_bytes(path.read_bytes().replace(b"0.95", b"0.99"))
    judge_all(fresh)
    assert (again(client, gate)["verdict"], again(client, gate)["error"]["code"]) == ("inconclusive", "artifact_error")


@pytest.mark.parametrize("program", ["raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)", "print('pass')"])
def test_a_judge_that_dies_is_given_up_after_a_while(fresh: HttpWorld, program: str) -> None:
    client = fresh.client("submit")
    gate = post(client, audit=audited(fresh, ROWS).id)
    dying = judging(fresh, child=(sys.executable, "-c", program))
    tried = 0
    while dying.step():
        tried += 1
        with writing(fresh.services.engine) as connection:
            connection.execute(gates.update().where(gates.c.state == "pending").values(due=utc_after(-1.0)))
    assert tried == 4
    assert (again(client, gate)["verdict"], again(client, gate)["error"]["code"]) == ("inconclusive", "judging_failed")


def test_a_judge_that_is_stopped_puts_the_gate_back(fresh: HttpWorld) -> None:
    client = fresh.client("submit")
    gate = post(client, audit=audited(fresh, ROWS).id)
    stop = threading.Event()
    stop.set()
    assert judging(fresh, child=(sys.executable, "-c", "import time; time.sleep(600)")).step(stop)
    judge_all(fresh)
    assert again(client, gate)["verdict"] == "pass"


def test_the_callback_is_signed_and_tells_ids_only(world: HttpWorld) -> None:
    client = world.client("submit")
    settings, services = world.services.settings, world.services
    with receiver(500) as there:
        gate = post(client, audit=audited(world, ROWS).id, callback_url="https://example.org/x")
        with writing(services.engine) as connection:  # an address that the API would refuse
            connection.execute(gate_deliveries.update().values(target={"url": f"{there.url}/hook"}))
        sender = Deliveries(services.deliveries, CALLBACK, GateCallbacks(services.gates, Outbound(LOOPBACK), settings))
        judge_all(world)
        assert sender.step() == 1
        make_due(world)
        assert again(client, gate)["callback_state"] == "pending"
        assert sender.step() == 1
        make_due(world)
        assert sender.step() == 0
    first, second = there.asked
    body = json.loads(first.body)
    assert body == gate_document(services.gates.record(gate["id"]), None)
    assert (body["gate"], body["job"], body["verdict"], body["error"]) == (gate["id"], gate["audit"], "pass", None)
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == f"gate-{gate['id']}"
    assert documented_verify()(SECRET, first.headers, first.body)
    assert again(client, gate)["callback_state"] == "delivered"


def test_a_callback_to_a_forbidden_address_is_given_up(fresh: HttpWorld) -> None:
    services = fresh.services
    gate = post(fresh.client("submit"), audit=audited(fresh, ROWS).id, callback_url="https://example.org/x")
    with writing(services.engine) as connection:
        connection.execute(gate_deliveries.update().values(target={"url": "http://127.0.0.1:9/hook"}))
    judge_all(fresh)
    sender = Deliveries(services.deliveries, CALLBACK, GateCallbacks(services.gates, Outbound(), services.settings))
    assert sender.step() == 1
    make_due(fresh)
    assert sender.step() == 0
    assert again(fresh.client("read"), gate)["callback_state"] == "failed"


def test_one_who_is_told_to_end_delivers_no_more_of_what_is_due(fresh: HttpWorld) -> None:
    client, job, stop, sent = fresh.client("submit"), audited(fresh, ROWS), threading.Event(), []

    def last(owed: OwedDelivery) -> bool:
        stop.set()
        sent.append(owed)
        return True

    for _ in range(3):
        post(client, audit=job.id, callback_url="https://example.org/x")
    judge_all(fresh)
    Deliveries(fresh.services.deliveries, CALLBACK, last).run(stop)
    assert len(sent) == 1


def test_a_clock_that_was_set_back_holds_no_gate_up(fresh: HttpWorld) -> None:
    client, job = fresh.client("submit"), audited(fresh, ROWS)
    gate = post(client, audit=job.id)
    with writing(fresh.services.engine) as connection:
        connection.execute(jobs.update().values(finished=utc_after(3600.0)))
    judge_all(fresh)
    assert again(client, gate)["verdict"] == "pass"
    shown = fresh.services.jobs.get("default", job.id).verdict
    assert shown is not None
    assert shown["gate"] == gate["id"]


def test_the_log_says_where_a_judge_died_and_nothing_of_what_it_read(fresh: HttpWorld, caplog: pytest.LogCaptureFixture) -> None:
    post(fresh.client("submit"), audit=audited(fresh, ROWS).id)
    judging(fresh, child=(sys.executable, "-c", "raise KeyError('a text of the dataset')")).step()
    assert "ended with code 1: KeyError" in caplog.text
    assert "a text of the dataset" not in caplog.text


def test_pages_show_the_verdict_and_its_reason_as_text(world: HttpWorld) -> None:
    client = world.client("submit")
    waiting = post(client, submission={"spec": SPEC})
    strange = audited(world, made.pairs(0.3, 300, axis="<script>alert(1)</script>"))
    post(client, audit=strange.id, policy=POLICY)
    judge_all(world)
    page = visit(world)
    assert f"none: {AWAITED}" in page.get(f"/audits/{waiting['audit']}").text
    shown = page.get(f"/audits/{strange.id}").text
    assert "gate: fail" in shown
    assert "broken: right[axis=&lt;script&gt;" in shown
    assert "<script>alert" not in shown
    assert "gate: fail" in page.get("/").text


def test_lists_are_filtered_and_paged(fresh: HttpWorld) -> None:
    client = fresh.client("submit")
    good, bad = audited(fresh, ROWS), audited(fresh, WORSE)
    for job in (good, bad, good):
        post(client, audit=job.id, policy=POLICY)
    judge_all(fresh)
    waiting = post(client, submission={"spec": SPEC}, policy="strict")

    def ids(query: str) -> list[str]:
        return [each["audit"] for each in client.get(f"/v1/gates?{query}").json()["items"]]

    assert ids("verdict=fail") == [bad.id]
    assert ids(f"audit={good.id}&verdict=pass&verdict=fail") == [good.id, good.id]
    assert ids("state=pending") == ids("policy=strict") == [waiting["audit"]]
    page = client.get("/v1/gates?limit=3").json()
    rest = client.get(f"/v1/gates?limit=3&cursor={page['next']}").json()
    assert [each["audit"] for each in (*page["items"], *rest["items"])] == [waiting["audit"], good.id, bad.id, good.id]
    assert rest["next"] is None
    for query in ("verdict=maybe", "state=judged", "cursor=eA", "limit=0", "nothing=1"):
        assert client.get(f"/v1/gates?{query}").status_code == 422
    assert client.get("/v1/gates?audit=nothing").status_code == 404


def make_due(world: HttpWorld) -> None:
    with writing(world.services.engine) as connection:
        connection.execute(gate_deliveries.update().values(due=utc_after(-1.0)))
