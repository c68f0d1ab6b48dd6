"""A comparison as a job: two audits of one dataset, what changed between them; and audits whose report is gone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.comparison_spec import ComparedAudit, ComparisonSpec
from service.jobs.model import JobKind, JobRecord, JobState
from tests.helpers.servers import Redis
from tests.helpers.workplace import Workplace, audit_of, material

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.fixture
def place(tmp_path: Path, redis: Redis) -> Iterator[Workplace]:
    redis.flush()
    made = Workplace(tmp_path, broker_url=redis.url)
    try:
        yield made
    finally:
        made.close()


def compared(place: Workplace, job: JobRecord) -> ComparedAudit:
    (report,) = (row for row in place.jobs.stages(job.id) if row.name == "report")
    assert report.key is not None
    assert report.content_digest is not None
    return ComparedAudit(job=job.id, model=job.spec["model"]["path"], report=report.key, content=report.content_digest)


def test_two_audits_are_compared_once(place: Workplace) -> None:
    files = material(place.folder / "material", pairs=120)
    place.worker()
    with place.dispatching():
        audits = [place.wait(place.submit(audit_of(place, files, edits={"budget": share})), 300) for share in (0.05, 0.1)]
        assert [job.state for job in audits] == [JobState.SUCCEEDED] * 2, place.log()
        spec = ComparisonSpec(a=compared(place, audits[0]), b=compared(place, audits[1]))
        job = place.wait(place.submit(spec.model_dump(), JobKind.COMPARE), 120)
        again = place.wait(place.submit(spec.model_dump(), JobKind.COMPARE), 120)
        gone = spec.model_copy(update={"b": spec.b.model_copy(update={"report": "0" * 64, "content": "1" * 64})})
        failed = place.wait(place.submit(gone.model_dump(), JobKind.COMPARE), 120)
    assert job.state is JobState.SUCCEEDED, (job.error, place.log())
    assert job.inputs == {"a": spec.a.content, "b": spec.b.content}
    stored = place.store.read("comparison", spec.key)
    found = json.loads(stored.path("comparison.json").read_bytes())
    assert found["same_model"] is True
    assert found["audited"]["slices"][0]["accuracy_change"]["estimate"] == 0  # one model on one dataset
    assert b"<html" in stored.path("comparison.html").read_bytes()
    assert stored.manifest.inputs == {"a": spec.a.content, "b": spec.b.content}
    assert {row.name: row.outcome for row in place.jobs.stages(again.id)}["comparison"] == "cached"
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert f"the report of audit {audits[1].id} is gone" in failed.error.message
