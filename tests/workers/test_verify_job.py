"""A verification as a job: it goes on from an audit, and its arms are trained by several workers side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safer_engine import demo_data
from safer_engine.science.arms import ARMS
from safer_engine.spec import AuditSpec
from service.jobs.model import JobKind, JobRecord, JobState, StageRecord, UnitKind, UnitState
from tests.helpers.servers import Redis
from tests.helpers.workplace import Workplace, audit_of, material

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
RECIPE: dict[str, Any] = {"epochs": 1, "batch": 16, "lr": 3e-3, "max_length": 64}


@pytest.fixture
def place(tmp_path: Path, redis: Redis) -> Iterator[Workplace]:
    redis.flush()
    made = Workplace(tmp_path, broker_url=redis.url)
    try:
        yield made
    finally:
        made.close()


def rows_of(place: Workplace, job: JobRecord) -> dict[str, StageRecord]:
    return {row.name: row for row in place.jobs.stages(job.id)}


def test_a_verification_goes_on_from_an_audit_and_shares_its_arms(place: Workplace) -> None:
    files = material(place.folder / "material", pairs=120)
    spec = audit_of(place, files, edits={"budget": 0.05})
    texts = [row["chosen"][0]["content"] for row in demo_data.generate(seed=1, n_groups=20).rows]
    base = place.upload(demo_data.build_base(place.folder / "base", texts, width=16, blocks=2))
    sections = {"retraining": {"base": base, "folds": 0, "recipe": RECIPE}, "verification": {"seeds": 2}}
    whole = AuditSpec.model_validate({**spec, **sections}).model_dump(mode="json")
    place.worker()
    place.worker()
    with place.dispatching():
        audit = place.wait(place.submit(spec), 300)
        assert audit.state is JobState.SUCCEEDED, (audit.error, place.log())
        job = place.wait(place.submit(whole, JobKind.VERIFY), 300)
        again = place.wait(place.submit(whole, JobKind.VERIFY), 300)
    assert job.state is JobState.SUCCEEDED, (job.error, place.log())
    stages = rows_of(place, job)
    assert {name for name, row in stages.items() if row.outcome == "computed"} == {"prepare", "verification", "report"}
    units = [unit for unit in place.jobs.units(job.id) if unit.stage == "verification"]
    names = {unit.name for unit in units if unit.kind is UnitKind.PART}
    assert names == {f"arm-{number}" for number in range(2 * len(ARMS))}
    assert {unit.state for unit in units} == {UnitState.DONE}
    assert stages["verification"].key is not None
    assert stages["report"].key is not None
    facts = place.store.read("verification", stages["verification"].key).manifest.meta
    assert (facts["outcome"], facts["seeds"]) == ("inconclusive", 2)  # by rule: fewer than five seeds
    report = json.loads(place.store.read("report", stages["report"].key).path("report.json").read_bytes())
    assert report["verification"]["outcome"] == "inconclusive"
    repeated = rows_of(place, again)
    assert {row.outcome for name, row in repeated.items() if name not in {"prepare"}} <= {"cached", "absent"}
    assert repeated["verification"].content_digest == stages["verification"].content_digest
