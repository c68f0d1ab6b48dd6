"""Marked data in the service: only a key with role redteam may have them read, and each such use is in the audit log."""

from __future__ import annotations

from typing import Any

import pytest

from service.jobs.access import Role
from service.jobs.audit_log import AuditEntry
from tests.helpers.http_world import SPEC, TRAINING, HttpWorld

FORCED = {"/v1/audits": SPEC, "/v1/trainings": TRAINING}


def forced(spec: dict[str, Any]) -> dict[str, Any]:
    return {"spec": {**spec, "dataset": {**spec["dataset"], "allow_poisoned": True}}}


def logged(world: HttpWorld) -> list[AuditEntry]:
    return [one for one in world.services.access.audit_entries("default", limit=10_000) if one.action == "redteam.force"]


@pytest.mark.parametrize("route", list(FORCED))
def test_a_key_without_the_role_may_not_force(world: HttpWorld, route: str) -> None:
    before = logged(world)
    answer = world.client("submit").post(route, json=forced(FORCED[route]))
    assert answer.status_code == 403
    assert "redteam" in answer.text
    assert logged(world) == before


@pytest.mark.parametrize("route", list(FORCED))
def test_one_with_it_may_and_it_is_logged(world: HttpWorld, route: str) -> None:
    key = world.services.access.create_key("default", "red", [Role.SUBMIT, Role.REDTEAM], "test")
    answer = world.client(None).post(route, json=forced(FORCED[route]), headers={"Authorization": f"Bearer {key.secret}"})
    assert answer.status_code == 201, answer.text
    (entry,) = (one for one in logged(world) if one.actor == key.key.id)
    assert entry.data["sections"] == ["dataset"]
