"""A model's audits over time: figures of their reports, changes from the version before, pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from service.jobs.model import JobRecord
from tests.helpers import gate_reports as made
from tests.helpers.http_world import HttpWorld, http_world

MODELS = ["a" * 64, "b" * 64, "c" * 64]
LABELS = {"model": "helper", "stage": "nightly"}


@pytest.fixture(scope="module")
def world() -> Iterator[HttpWorld]:
    with http_world() as running:
        yield running


def audited(world: HttpWorld, accuracy: float, model: str, evaluation: str = "e" * 64, **given: Any) -> JobRecord:
    rows = made.pairs(accuracy, 200) + made.pairs(0.9, 100, axis="chat", subset="helpful")
    report = made.report(rows)
    report["edits"]["doubtful_share"] = 0.125
    files = {"report": {"report.json": json.dumps(report).encode(), "evaluation.jsonl": made.lines(rows)}}
    return world.finish(world.submit(inputs={"model": model, "evaluation": evaluation}, **given), files)


@pytest.fixture(scope="module")
def versions(world: HttpWorld) -> list[JobRecord]:
    """Four versions, oldest first; the third was measured on other data, the last is the third's model again."""
    return [
        audited(world, 0.9, MODELS[0], labels=LABELS),
        audited(world, 0.8, MODELS[1], labels=LABELS),
        audited(world, 0.7, MODELS[2], "f" * 64, labels=LABELS),
        audited(world, 0.75, MODELS[2], "f" * 64, labels=LABELS),
    ]


def items(world: HttpWorld, path: str, **params: Any) -> list[dict[str, Any]]:
    response = world.client("read").get(path, params=params)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["items"]
    return found


def safety(item: dict[str, Any]) -> dict[str, Any]:
    (found,) = [row for row in item["accuracy"] if row["axis"] == "safety"]
    return dict(found)


def test_versions_are_listed_newest_first_with_their_change(world: HttpWorld, versions: list[JobRecord]) -> None:
    found = items(world, "/v1/history", label="model=helper")
    assert [one["audit"] for one in found] == [job.id for job in reversed(versions)]
    assert [one["previous"] for one in found] == [*(job.id for job in reversed(versions[:-1])), None]
    assert [safety(one)["accuracy"] for one in found] == pytest.approx([0.75, 0.7, 0.8, 0.9])
    assert safety(found[0])["change"] == pytest.approx(0.05)
    assert safety(found[1])["change"] is None  # measured on other pairs
    assert safety(found[2])["change"] == pytest.approx(-0.1)
    assert safety(found[3])["change"] is None
    assert [one["same_model"] for one in found] == [True, False, False, None]
    assert [row["axis"] for row in found[0]["accuracy"]] == [None, "chat", "safety"]
    assert all(safety(one)["lo"] < safety(one)["accuracy"] < safety(one)["hi"] and safety(one)["n"] == 200 for one in found)
    assert {one["doubtful_share"] for one in found} == {0.125}
    assert {one["missing"] for one in found} == {None}


def test_a_page_knows_the_version_before_it_too(world: HttpWorld, versions: list[JobRecord]) -> None:
    client = world.client("read")
    seen, cursor = [], None
    while True:
        page = client.get(
            "/v1/history",
            params={"label": ["model=helper", "stage=nightly"], "limit": 1, **({"cursor": cursor} if cursor else {})},
        ).json()
        seen += page["items"]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == items(world, "/v1/history", label="model=helper")
    assert len(seen) == len(versions)


def test_by_digest_there_are_the_audits_of_one_model(world: HttpWorld, versions: list[JobRecord]) -> None:
    found = items(world, f"/v1/models/{MODELS[2]}/history")
    assert [one["audit"] for one in found] == [versions[3].id, versions[2].id]
    assert {one["model_digest"] for one in found} == {MODELS[2]}
    assert items(world, f"/v1/models/{'9' * 64}/history") == []
    assert world.client("read", "other").get(f"/v1/models/{MODELS[2]}/history").json()["items"] == []


def test_what_cannot_be_read_says_why_and_hides_nothing_else(world: HttpWorld) -> None:
    digest = "7" * 64
    good = audited(world, 0.9, digest)
    damaged = made.report(made.pairs(0.9, 40))
    damaged["evaluation"]["groups"] = [{"axis": 3}]
    for report in (b"no json", json.dumps(damaged).encode(), b'{"schema_version": 2}'):
        world.finish(world.submit(inputs={"model": digest}), {"report": {"report.json": report}})
    found = items(world, f"/v1/models/{digest}/history")
    assert found[-1]["audit"] == good.id
    assert [bool(one["missing"]) for one in found] == [True, True, True, False]
    assert all(one["accuracy"] == [] for one in found[:-1])


def test_unfinished_audits_are_no_versions_and_a_label_is_needed(world: HttpWorld) -> None:
    world.submit(inputs={"model": "5" * 64})
    assert items(world, f"/v1/models/{'5' * 64}/history") == []
    client = world.client("read")
    assert client.get("/v1/history").status_code == 422
    assert client.get("/v1/history", params={"label": "nonsense"}).status_code == 422
    assert client.get("/v1/history", params={"label": "a=b", "limit": 51}).status_code == 422
    assert client.get("/v1/history", params={"label": "a=b", "cursor": "nonsense"}).status_code == 422
