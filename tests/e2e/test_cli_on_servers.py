"""From a client's command line to the report, on real servers and real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from safer_engine.pipeline import STAGES
from tests.helpers.deployment import Deployment
from tests.helpers.servers import Postgres, Redis
from tests.helpers.workplace import material

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
SECTIONS: dict[str, Any] = {"edits": {"budget": 0.1}}


@dataclass(frozen=True)
class Audited:
    """A deployment, and what `submit --wait --json` said of an audit of files of the client."""

    place: Deployment
    files: dict[str, Path]
    job: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.job["id"])


@pytest.fixture(scope="module", params=["folder and sqlite", "moto and postgres", "rgw and postgres"])
def audited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, redis: Redis) -> Iterator[Audited]:
    folder = tmp_path_factory.mktemp("cli")
    kind = request.param.split()[0]
    given: dict[str, Any] = {}
    if kind != "folder":
        postgres: Postgres = request.getfixturevalue("postgres")
        given = {**request.getfixturevalue(f"s3_{kind}").settings("cli"), "database_url": postgres.fresh(f"cli_{kind}")}
    redis.flush()
    place = Deployment(folder, broker_url=redis.url, **given)
    try:
        files = material(folder / "of the client")
        place.start(workers=2)
        done = place.cli("submit", *place.submit_flags(files, **SECTIONS), "--wait", "--json", "--label", "team=é1")
        yield Audited(place, files, json.loads(done.stdout))
    finally:
        place.close()


def test_submit_uploads_waits_and_says_how_it_ended(audited: Audited) -> None:
    assert (audited.job["state"], audited.job["error"], audited.job["labels"]) == ("succeeded", None, {"team": "é1"})
    assert [stage["name"] for stage in audited.job["stages"]] == ["prepare", *(stage.name for stage in STAGES)]
    assert str(audited.place.folder) not in json.dumps(audited.job)
    audited.place.check_sound(audited.id)


def test_report_and_files_come_whole(audited: Audited) -> None:
    place = audited.place
    page = Path(place.cli("report", audited.id, "--out", "mine.html").stdout.strip())
    text = page.read_text(encoding="utf-8")
    assert "<html" in text
    assert str(place.folder) not in text
    found = {Path(path).name: Path(path) for path in place.ask("download", audited.id, "--out", "all")["files"]}
    assert found["report.html"].read_bytes() == page.read_bytes()
    assert {"report.json", "report.md", "edits.jsonl", "features.parquet", "pair_scores.parquet", "sae.safetensors"} <= set(found)
    rows = sum(1 for line in audited.files["dataset"].read_text().splitlines() if line)
    assert len(found["edits.jsonl"].read_text().splitlines()) == rows
    log = [json.loads(line) for line in found["job.log"].read_text().splitlines()]
    assert {line["stage"] for line in log if line.get("stage")} == {"prepare", *(stage.name for stage in STAGES)}
    inner = place.ask("download", audited.id, "stages/*", "--out", "all")["files"]
    assert any("/stages/pairs/" in path for path in inner)


def test_reviewers_decide_and_export(audited: Audited) -> None:
    place = audited.place
    proposed = place.ask("edits", audited.id, "list", "-n", "5")["items"]
    first, second = proposed[0], proposed[1]
    place.ask("edits", audited.id, "decide", first["pair_id"], "keep", "--note", "irony")
    place.ask("edits", audited.id, "decide", second["pair_id"], "drop")
    open_ones = place.ask("edits", audited.id, "list", "--open", "-n", "500")["items"]
    assert {first["pair_id"], second["pair_id"]}.isdisjoint(edit["pair_id"] for edit in open_ones)
    exported = Path(place.ask("edits", audited.id, "export", "--out", "decided")["path"])
    actions = {row["pair_id"]: row["action"] for row in map(json.loads, exported.read_text().splitlines())}
    assert (actions[first["pair_id"]], actions[second["pair_id"]]) == ("keep", "drop")
    names = [item["name"] for item in place.ask("download", audited.id, "--list")["items"]]
    assert any("decisions" in name for name in names), names


def test_list_status_and_logs(audited: Audited) -> None:
    place = audited.place
    listed = place.ask("list", "--state", "succeeded", "--label", "team=é1")["items"]
    assert audited.id in [job["id"] for job in listed]
    assert place.ask("status", audited.id)["state"] == "succeeded"
    events = [json.loads(line) for line in place.cli("logs", audited.id, "--json").stdout.splitlines()]
    assert (events[0]["data"]["state"], events[-1]["data"]["state"]) == ("queued", "succeeded")
    assert [event["id"] for event in events] == sorted({event["id"] for event in events})
    shown = place.cli("watch", audited.id).stderr
    assert "succeeded" in shown


def test_the_same_files_are_not_uploaded_or_computed_again(audited: Audited) -> None:
    place = audited.place
    before = place.jobs.usage("default").bytes
    again = place.ask("submit", *place.submit_flags(audited.files, **SECTIONS), "--wait")
    assert again["state"] == "succeeded"
    assert {row.outcome for row in place.jobs.stages(again["id"]) if row.name != "prepare"} <= {"cached", "absent"}
    place.check_sound(audited.id, again["id"])
    assert place.jobs.usage("default").bytes - before < 100_000  # its log, and nothing else


def test_what_fails_says_why_and_what_to_do(audited: Audited) -> None:
    place = audited.place
    wrong = place.folder / "wrong.jsonl"
    wrong.write_text('{"text": "no preference"}\n' * 5, encoding="utf-8")
    files = {"model": audited.files["model"], "dataset": wrong}
    said = place.cli("submit", *place.submit_flags(files), "--wait", code=2)
    assert "failed" in said.stderr
    assert "hint:" in said.stderr
    job_id = place.ask("list", "--state", "failed")["items"][0]["id"]
    assert place.ask("status", job_id)["error"]["code"] == "dataset_refused"
    place.cli("report", job_id, code=2)
    place.check_sound()
