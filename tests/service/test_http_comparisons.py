"""Comparisons over HTTP: of two finished audits of one project, by what the store holds of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service.comparison_spec import ComparisonSpec
from service.jobs.model import JobKind, StagePart
from service.jobs.requests import NewJob
from tests.helpers.http_world import SPEC, HttpWorld, http_world, payloads


@pytest.fixture(scope="module")
def world() -> Iterator[HttpWorld]:
    with http_world() as made:
        yield made


def post(world: HttpWorld, a: str, b: str, status: int = 201, **more: Any) -> dict[str, Any]:
    response = world.client("submit").post("/v1/comparisons", json={"a": a, "b": b, **more})
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()
    return found


def test_it_names_the_reports_of_both_and_is_listed_by_its_kind(world: HttpWorld) -> None:
    a, b = world.finished(), world.finished()
    job = post(world, a.id, b.id, labels={"for": "review"})
    assert (job["kind"], job["state"], job["labels"]) == ("compare", "queued", {"for": "review"})
    assert [(stage["name"], stage["queue"]) for stage in job["stages"]] == [("prepare", "cpu"), ("comparison", "cpu")]
    spec = ComparisonSpec.model_validate(job["spec"])
    for one, audit in ((spec.a, a), (spec.b, b)):
        report = next(row for row in world.services.jobs.stages(audit.id) if row.name == "report")
        assert (one.job, one.model, one.report, one.content) == (audit.id, "org/rm", report.key, report.content_digest)
    listed = world.client("submit").get("/v1/audits", params={"kind": "compare"}).json()["items"]
    assert [item["id"] for item in listed] == [job["id"]]
    assert post(world, b.id, a.id)["id"] != job["id"]


def test_its_page_is_served_as_reports_are(world: HttpWorld) -> None:
    a, b = world.finished(), world.finished()
    made = post(world, a.id, b.id)
    page = b"<!doctype html><title>C</title><style>p{}</style><script>1</script><p>compared"
    world.finish(world.services.jobs.job(made["id"]), {"comparison": {"comparison.html": page, "comparison.json": b"{}"}})
    job = f"/v1/audits/{made['id']}"
    names = [item["name"] for item in world.client("read").get(f"{job}/artifacts").json()["items"]]
    assert names == ["comparison.html", "comparison.json"]
    served = world.client("read").get(f"{job}/report")
    assert served.content == page
    assert "sandbox" in served.headers["content-security-policy"]
    assert world.client("read").get(f"{job}/artifacts/comparison.json").content == b"{}"
    visitor = world.client(None)
    visitor.post("/login", data={"key": world.keys["default", "read"], "next": "/"})
    shown = visitor.get(f"/audits/{made['id']}").text
    assert "Comparison of org/rm" in shown
    assert '<span class="soft">with</span> org/rm' in shown
    assert f"/audits/{made['id']}/report" in shown


def test_only_two_finished_audits_of_the_project_are_compared(world: HttpWorld) -> None:
    audit, waiting = world.finished(), world.submit()
    training = world.submit(kind=JobKind.TRAIN_RM)
    assert post(world, audit.id, "0" * 26, 404)["code"] == "not_found"
    assert post(world, audit.id, world.finished(project="other").id, 404)["code"] == "not_found"
    assert "are both" in post(world, audit.id, audit.id, 409)["detail"] + post(world, audit.id, audit.id, 409)["title"]
    assert "no audit" in post(world, audit.id, training.id, 409)["detail"]
    assert "it has no report" in post(world, waiting.id, audit.id, 409)["detail"]
    assert post(world, audit.id, "", 422)["code"] == "request_invalid"
    read = world.client("read").post("/v1/comparisons", json={"a": audit.id, "b": audit.id})
    assert read.status_code == 403


def test_the_key_is_of_what_is_compared_not_of_the_jobs(world: HttpWorld) -> None:
    other = {**payloads(), "report": {"report.json": b"{}"}}
    stages = tuple(StagePart(name, "cpu") for name in other)
    b = world.finish(world.services.jobs.submit("default", NewJob(JobKind.AUDIT, SPEC, stages)).job, other)
    spec = ComparisonSpec.model_validate(post(world, world.finished().id, b.id)["spec"])
    renamed = spec.model_copy(update={"a": spec.a.model_copy(update={"job": "another"})})
    assert renamed.key == spec.key
    assert ComparisonSpec(a=spec.b, b=spec.a).key != spec.key
