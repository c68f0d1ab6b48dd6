"""Verifications over HTTP: what they are asked for with, and what they take from the audit whose edits they verify."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service.jobs.model import JobRecord
from service.jobs.requests import Finished
from tests.helpers.http_world import SPEC, TRAINING, HttpWorld, http_world

SECTIONS: dict[str, Any] = {"retraining": {"base": "org/base"}, "evaluation": {"source": {"kind": "hub", "path": "org/held"}}}
PINS = {"model": "1" * 64, "model.revision": "a" * 40, "dataset": "2" * 64, "dataset.revision": "b" * 40}


@pytest.fixture(scope="module")
def world() -> Iterator[HttpWorld]:
    with http_world() as made:
        yield made


def post(world: HttpWorld, status: int = 201, **body: Any) -> dict[str, Any]:
    response = world.client("submit").post("/v1/verifications", json=body)
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()
    return found


def audited(world: HttpWorld, spec: dict[str, Any]) -> JobRecord:
    """An audit that a worker has prepared: its inputs are at these revisions."""
    made = world.client("submit").post("/v1/audits", json={"spec": spec}).json()
    job = world.services.jobs.job(made["id"])
    world.services.jobs.finish(world.lease(job), Finished(inputs=PINS))
    return world.services.jobs.job(job.id)


def test_it_walks_the_stages_of_an_audit_and_is_listed_by_its_kind(world: HttpWorld) -> None:
    job = post(world, spec={**SPEC, **SECTIONS})
    audit = world.client("submit").post("/v1/audits", json={"spec": SPEC}).json()
    assert (job["kind"], job["state"]) == ("verify", "queued")
    assert [stage["name"] for stage in job["stages"]] == [stage["name"] for stage in audit["stages"]]
    assert (job["spec"]["verification"]["seeds"], job["spec"]["retraining"]["base"]) == (5, "org/base")
    listed = world.client("submit").get("/v1/audits", params={"kind": "verify"}).json()["items"]
    assert job["id"] in {item["id"] for item in listed}
    assert {item["kind"] for item in listed} == {"verify"}


def test_it_goes_on_from_an_audit_at_the_revisions_that_were_found(world: HttpWorld) -> None:
    audit = audited(world, {**SPEC, "sae": {"k": 7}, "dataset": "org/pairs@main#test", "seed": 3})
    job = post(world, audit=audit.id, spec={**SECTIONS, "verification": {"seeds": 7}})
    assert job["spec"]["model"]["path"] == f"org/rm@{'a' * 40}"
    assert job["spec"]["dataset"]["source"] == {
        "kind": "hub", "path": "org/pairs", "revision": "b" * 40, "name": None, "split": "test",
    }  # fmt: skip
    assert (job["spec"]["sae"]["k"], job["spec"]["seed"], job["spec"]["verification"]["seeds"]) == (7, 3, 7)
    assert job["spec"]["retraining"]["folds"] == 0  # so that its suspicion, and so its edits, are those of the audit
    without = {key: value for key, value in audit.spec.items() if key not in {"model", "dataset", "retraining", "evaluation"}}
    kept = {key: job["spec"][key] for key in without} | {"verification": None}
    assert kept == without


def test_retraining_of_the_audit_stays_as_it_was(world: HttpWorld) -> None:
    audit = audited(world, {**SPEC, **SECTIONS, "retraining": {"base": "org/base@x", "folds": 2, "recipe": {"epochs": 3}}})
    job = post(world, audit=audit.id, spec={})
    assert (job["spec"]["retraining"]["folds"], job["spec"]["retraining"]["recipe"]["epochs"]) == (2, 3)
    assert job["spec"]["evaluation"]["source"]["path"] == "org/held"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (SPEC, "name the model to train from"),
        ({**SPEC, "retraining": SECTIONS["retraining"]}, "give section evaluation"),
        ({**SPEC, **SECTIONS, "verification": None}, "spec.verification is null"),
        ({**SPEC, **SECTIONS, "verification": {"seeds": 0}}, "spec.verification.seeds"),
        (SECTIONS, "spec.model"),
        ({**SPEC, **SECTIONS, "retraining": {"base": "/etc"}}, "retraining.base"),
    ],
)
def test_what_is_missing_or_wrong_is_said(world: HttpWorld, spec: dict[str, Any], said: str) -> None:
    response = world.client("submit").post("/v1/verifications", json={"spec": spec})
    assert response.status_code in {403, 422}
    assert said in response.text


def test_only_an_audit_of_the_project_can_be_verified(world: HttpWorld) -> None:
    training = world.client("submit").post("/v1/trainings", json={"spec": TRAINING}).json()
    assert "no audit" in post(world, 409, audit=training["id"], spec=SECTIONS)["detail"]
    elsewhere = world.submit(project="other")
    assert post(world, 404, audit=elsewhere.id, spec=SECTIONS)["code"] == "not_found"
    read = world.client("read").post("/v1/verifications", json={"spec": {**SPEC, **SECTIONS}})
    assert read.status_code == 403
