"""Drills over HTTP: off by default, for the role redteam alone, logged; what they may not name or keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service.jobs.access import Role
from tests.helpers.http_world import TRAINING, HttpWorld, http_world

DRILL: dict[str, Any] = {**TRAINING, "evaluation": {"source": {"kind": "hub", "path": "org/held"}}, "seeds": 2}


@pytest.fixture(scope="module")
def world() -> Iterator[HttpWorld]:
    with http_world(enable_redteam=True) as made:
        yield made


def ask(world: HttpWorld, *roles: Role, **spec: Any) -> Any:
    key = world.services.access.create_key("default", "red", list(roles), "test")
    headers = {"Authorization": f"Bearer {key.secret}"}
    return world.client(None).post("/v1/drills", json={"spec": {**DRILL, **spec}}, headers=headers), key.key.id


def test_it_is_off_unless_the_operator_switches_it_on() -> None:
    with http_world() as world:
        answer, _ = ask(world, Role.REDTEAM)
    assert answer.status_code == 403
    assert "SAFER_ENABLE_REDTEAM=1" in answer.text


def test_a_key_with_the_role_may_and_it_is_logged(world: HttpWorld) -> None:
    answer, key = ask(world, Role.REDTEAM)
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert (job["kind"], job["spec"]["seeds"], job["spec"]["keep_poison"]) == ("drill", 2, False)
    assert [(stage["name"], stage["queue"]) for stage in job["stages"]] == [("prepare", "cpu"), ("drill", "gpu")]
    (entry,) = (one for one in world.services.access.audit_entries("default", limit=1000) if one.action == "redteam.drill")
    assert (entry.actor, entry.data["rules"]) == (key, ["score", "margin", "length", "random"])
    made = world.services.jobs.job(job["id"])
    world.finish(made, {"drill": {"drill.html": b"<!doctype html><p>drilled", "drill.json": b"{}"}})
    read = world.client("read")
    assert [item["name"] for item in read.get(f"/v1/audits/{job['id']}/artifacts").json()["items"]] == [
        "drill.html",
        "drill.json",
    ]
    assert read.get(f"/v1/audits/{job['id']}/report").content.endswith(b"drilled")


def test_other_roles_may_not(world: HttpWorld) -> None:
    for role in (Role.SUBMIT, Role.READ, Role.REVIEW):
        assert ask(world, role)[0].status_code == 403


@pytest.mark.parametrize(
    ("spec", "status", "words"),
    [
        ({"keep_poison": True}, 403, "keeps no poisoned data"),
        ({"audit": {"model": {"path": "org/other"}}}, 422, "is set by the drill itself"),
        ({"audit": {"labels": {"labeller": {"kind": "local_lm", "path": "org/lm"}}}}, 422, "name no models or data"),
        ({"audit": {"sae": {"given": "/etc"}}}, 422, "sae.given"),
        ({"audit": {"sae": {"k": -1}}}, 422, "sae.k"),
        ({"base": "/etc"}, 422, "base"),
        ({"budgets": [0.9]}, 422, "budget"),
        ({"dataset": {**TRAINING["dataset"], "allow_poisoned": True}}, 422, "clean data"),
        ({"evaluation": None}, 422, "evaluation"),
    ],
)
def test_what_it_may_not_name_is_said(world: HttpWorld, spec: dict[str, Any], status: int, words: str) -> None:
    answer, _ = ask(world, Role.REDTEAM, **spec)
    assert answer.status_code == status, answer.text
    assert words in answer.text
