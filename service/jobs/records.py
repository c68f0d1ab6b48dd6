"""Rows of the database as records."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqlalchemy import RowMapping

from service.jobs.model import EventRecord, JobError, JobKind, JobRecord, JobState, StageRecord, StageState, UnitKind, UnitState
from service.jobs.requests import UnitRecord


def job_of(row: RowMapping) -> JobRecord:
    """A row of `jobs`."""
    return JobRecord(
        id=row["id"],
        project=row["project"],
        kind=JobKind(row["kind"]),
        state=JobState(row["state"]),
        priority=row["priority"],
        spec=row["spec"],
        created=row["created"],
        labels=row["labels"],
        callback_url=row["callback_url"],
        idempotency_key=row["idempotency_key"],
        body_digest=row["body_digest"],
        submitted_by=row["submitted_by"],
        started=row["started"],
        finished=row["finished"],
        cancel_requested=row["cancel_requested"],
        error=error_of(row["error"]),
        inputs=row["inputs"],
        plan=row["plan"],
        verdict=row["verdict"],
        verdict_reason=row["verdict_reason"],
        gpu_seconds=row["gpu_seconds"],
        gpu_seconds_budget=row["gpu_seconds_budget"],
        attempt=row["attempt"],
    )


def stage_of(row: RowMapping) -> StageRecord:
    """A row of `stages`."""
    given = {name: row[name] for name in StageRecord.__dataclass_fields__ if name != "state"}
    return StageRecord(state=StageState(row["state"]), **given)


def event_of(row: RowMapping) -> EventRecord:
    """A row of `events`."""
    return EventRecord(**{name: row[name] for name in EventRecord.__dataclass_fields__})


def unit_of(row: RowMapping) -> UnitRecord:
    """A row of `units` with its stage's name as `stage`."""
    given = {name: row[name] for name in UnitRecord.__dataclass_fields__ if name not in ("kind", "state")}
    return UnitRecord(kind=UnitKind(row["kind"]), state=UnitState(row["state"]), **given)


def error_of(value: dict[str, Any] | None) -> JobError | None:
    """A stored error."""
    return JobError(**value) if value else None


def error_row(error: JobError) -> dict[str, Any]:
    """An error as it is stored."""
    return asdict(error)
