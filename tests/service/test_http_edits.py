"""Edits over HTTP: found, decided on, exported."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from safer_engine.edit_lines import read_edit_lines
from service.errors import Malformed
from service.http.edit_rows import EditFilter, EditRows, suspicion_order
from service.jobs.model import JobRecord
from tests.helpers.http_world import EDITS, HttpWorld, edit_line

BY_SUSPICION = ["p/1", "p-4", "é ✓", '"suspicion": 1', "p-0", "p-3"]


@pytest.fixture(scope="module")
def untouched(world: HttpWorld) -> JobRecord:
    return world.finished()


@pytest.fixture
def job(world: HttpWorld) -> JobRecord:
    return world.finished()


def ids(world: HttpWorld, job: JobRecord, **params: Any) -> list[str]:
    response = world.client("read").get(f"/v1/audits/{job.id}/edits", params=params)
    assert response.status_code == 200, response.text
    return [item["pair_id"] for item in response.json()["items"]]


def edit_path(job: JobRecord, pair_id: str) -> str:
    return f"/v1/audits/{job.id}/edits/{quote(pair_id, safe='')}"


def test_edits_are_listed_most_suspicious_first(world: HttpWorld, untouched: JobRecord) -> None:
    assert ids(world, untouched) == BY_SUSPICION
    item = world.client("review").get(f"/v1/audits/{untouched.id}/edits").json()["items"][0]
    assert item == EDITS[1] | {"decision": None}


@pytest.mark.parametrize(
    ("params", "found"),
    [
        ({"action": "drop"}, ["p/1", "p-4"]),
        ({"action": ["drop", "flip"]}, ["p/1", "p-4", "é ✓"]),
        ({"axis": "chat"}, ["p-4"]),
        ({"min_suspicion": 0.95}, ["p/1", "p-4", "é ✓"]),
        ({"min_suspicion": 0}, BY_SUSPICION[:-1]),
        ({"decided": "true"}, []),
        ({"decided": "false", "action": "keep"}, ["p-0", "p-3"]),
    ],
)
def test_edits_are_filtered(world: HttpWorld, untouched: JobRecord, params: dict[str, Any], found: list[str]) -> None:
    assert ids(world, untouched, **params) == found


def test_pages_follow_one_another_without_gap_or_repeat(world: HttpWorld, untouched: JobRecord) -> None:
    client, found, cursor = world.client("read"), [], None
    for _ in range(10):
        page = client.get(f"/v1/audits/{untouched.id}/edits", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        found += [item["pair_id"] for item in page["items"]]
        if (cursor := page["next"]) is None:
            break
    assert found == BY_SUSPICION


@pytest.mark.parametrize("cursor", ["QUFB", "ZWRpdHM6LTE", "ZWRpdHM6OTk", "____", "a"])
def test_a_cursor_that_was_made_up_is_refused(world: HttpWorld, untouched: JobRecord, cursor: str) -> None:
    response = world.client("read").get(f"/v1/audits/{untouched.id}/edits", params={"cursor": cursor})
    assert (response.status_code, response.json()["code"]) == (400, "malformed")


@pytest.mark.parametrize("pair_id", [line["pair_id"] for line in EDITS])
def test_a_decision_counts_and_is_remembered(world: HttpWorld, job: JobRecord, pair_id: str) -> None:
    client, path = world.client("review"), edit_path(job, pair_id)
    assert client.get(path).json()["history"] == []
    first = client.patch(path, json={"action": "keep", "note": "seen"}).json()
    second = client.patch(path, json={"action": "drop"}).json()
    assert (first["pair_id"], first["decision"]["action"], first["decision"]["note"]) == (pair_id, "keep", "seen")
    assert [each["action"] for each in second["history"]] == ["keep", "drop"]
    assert second["decision"]["reviewer"] == "review of default"
    assert client.get(path).json() == second
    assert ids(world, job, decided="true") == [pair_id]
    assert pair_id not in ids(world, job, decided="false")


@pytest.mark.parametrize(
    "body", [{"action": "remove"}, {"action": "drop", "note": "x" * 2001}, {}, {"action": "drop", "who": "me"}, {"action": None}]
)
def test_a_decision_that_is_none_is_refused(world: HttpWorld, untouched: JobRecord, body: object) -> None:
    assert world.client("review").patch(edit_path(untouched, "p-0"), json=body).status_code == 422


def test_only_pairs_of_the_job_are_decided_on(world: HttpWorld, untouched: JobRecord) -> None:
    client = world.client("review")
    for pair_id in ("p-9", "p-", "p-00", "x" * 200):
        assert client.patch(edit_path(untouched, pair_id), json={"action": "drop"}).status_code == 404
    assert client.patch(edit_path(untouched, "x" * 201), json={"action": "drop"}).status_code == 422
    running = world.submit()
    assert client.patch(edit_path(running, "p-0"), json={"action": "drop"}).status_code == 404


def test_the_export_is_what_apply_reads_and_never_changes(world: HttpWorld, job: JobRecord, tmp_path: Path) -> None:
    client = world.client("admin")
    client.patch(edit_path(job, "p-0"), json={"action": "drop", "note": "wrong"})
    first = client.get(f"/v1/audits/{job.id}/edits/export").json()
    content = client.get(f"/v1/audits/{job.id}/artifacts/decisions.jsonl").content
    (tmp_path / "decisions.jsonl").write_bytes(content)
    lines = read_edit_lines(tmp_path / "decisions.jsonl")
    assert [(line.pair_id, line.action) for line in lines] == [
        (line["pair_id"], "drop" if line["pair_id"] == "p-0" else line["action"]) for line in EDITS
    ]
    told = json.loads(content.splitlines()[0])["decision"]
    assert (told["recommended"], told["reviewer"], told["note"]) == ("keep", "admin of default", "wrong")
    assert client.get(f"/v1/audits/{job.id}/edits/export").json() == first
    assert (first["decisions"], first["size"]) == (1, len(content))
    client.patch(edit_path(job, "p-4"), json={"action": "keep"})
    second = client.get(f"/v1/audits/{job.id}/edits/export").json()
    assert second["digest"] != first["digest"]
    served = client.get(f"/v1/audits/{job.id}/artifacts/decisions.jsonl")
    assert served.headers["etag"] == f'"{second["digest"]}"'
    reviewer = world.client("review")
    assert reviewer.get(f"/v1/audits/{job.id}/artifacts/decisions.jsonl").content == served.content
    assert reviewer.get(f"/v1/audits/{job.id}/artifacts/edits.jsonl").status_code == 403
    logged = [entry["action"] for entry in client.get("/v1/log?limit=500").json()["items"] if entry["target"] == job.id]
    assert logged.count("edit.export") == 2
    assert logged.count("edit.decide") == 2


def test_lines_are_read_from_a_large_file_in_order(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    suspicions = [None if number % 7 == 0 else (number * 37 % 101) / 101 for number in range(500)]
    lines = [edit_line(f"p{number}", "keep", found) for number, found in enumerate(suspicions)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rows = EditRows(path, suspicion_order(path))
    wanted = sorted(range(500), key=lambda number: (suspicions[number] is None, -(suspicions[number] or 0), number))
    assert [line["pair_id"] for line in rows.page(EditFilter(), {}, None, 1000).lines] == [f"p{number}" for number in wanted]
    assert [line["pair_id"] for line in rows.lines()] == [f"p{number}" for number in range(500)]
    assert len(rows) == 500


def test_a_filter_that_finds_little_gives_short_pages_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.edit_rows.SCAN_LINES", 10)
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(edit_line(f"p{n}", "drop" if n == 35 else "keep", 0.5)) + "\n" for n in range(40)))
    rows, cursor, found, pages = EditRows(path, suspicion_order(path)), None, [], 0
    while pages == 0 or cursor is not None:
        page = rows.page(EditFilter(frozenset({"drop"})), {}, cursor, 5)
        found, cursor, pages = found + page.lines, page.next, pages + 1
    assert ([line["pair_id"] for line in found], pages) == (["p35"], 4)
    with pytest.raises(Malformed, match="cursor"):
        rows.page(EditFilter(), {}, "ZWRpdHM6NDE", 5)
