"""Listing jobs, newest first, page by page: every page walks an index, however many jobs there are."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ColumnElement, Engine, Select, and_, exists, or_, select

from service.jobs.cursors import Place, read_place
from service.jobs.database import reading
from service.jobs.model import JobRecord, JobState, StageState
from service.jobs.records import job_of
from service.jobs.requests import JobQuery, Page
from service.jobs.tables import job_inputs, job_labels, jobs, stages

MAX_PAGE = 500


class JobListing:
    """Finds jobs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def find(self, project: str, query: JobQuery = JobQuery(), cursor: str | None = None, limit: int = 50) -> Page[JobRecord]:  # noqa: B008 - frozen
        """Jobs of a project, newest first. Raises SpecError for a cursor that no page gave."""
        size = max(1, min(limit, MAX_PAGE))
        after = read_place(cursor) if cursor else None
        with reading(self._engine) as connection:
            # One walk for each state, merged: an index leads through one state in order, not through several.
            rows = [
                row
                for state in query.states or (None,)
                for row in connection.execute(_statement(project, query, state, after).limit(size + 1)).mappings()
            ]
        rows.sort(key=lambda row: (row["created"], row["id"]), reverse=True)
        found = tuple(job_of(row) for row in rows[:size])
        return Page(found, Place(found[-1].created, found[-1].id).written() if len(rows) > size else None)


def _statement(project: str, query: JobQuery, state: JobState | None, after: Place | None) -> Select[tuple[object, ...]]:
    labels = sorted(query.labels.items())
    conditions: list[ColumnElement[bool]] = [jobs.c.project == project, jobs.c.deleted.is_(None)]
    statement = select(*jobs.c)
    created: ColumnElement[datetime] = jobs.c.created
    job_id: ColumnElement[str] = jobs.c.id
    if labels:
        created, job_id = job_labels.c.created, job_labels.c.job_id
        statement = select(*jobs.c).select_from(job_labels).join(jobs, jobs.c.id == job_labels.c.job_id)
        name, value = labels[0]
        conditions += [job_labels.c.project == project, job_labels.c.name == name, job_labels.c.value == value]
    conditions += [_has_label(name, value) for name, value in labels[1:]]
    conditions += _narrowed(query, state)
    if query.created_from is not None:
        conditions.append(created >= query.created_from)
    if query.created_before is not None:
        conditions.append(created < query.created_before)
    if after is not None:
        conditions += [created <= after.created, or_(created < after.created, job_id < after.id)]
    return statement.where(and_(*conditions)).order_by(created.desc(), job_id.desc())


def _narrowed(query: JobQuery, state: JobState | None) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if state is not None:
        conditions.append(jobs.c.state == state)
    if query.kind is not None:
        conditions.append(jobs.c.kind == query.kind)
    if query.stage is not None:
        at_stage = select(stages.c.job_id).where(stages.c.state == StageState.OPEN, stages.c.name == query.stage)
        conditions.append(jobs.c.id.in_(at_stage))
    if query.input_digest is not None:
        conditions.append(jobs.c.id.in_(select(job_inputs.c.job_id).where(job_inputs.c.digest == query.input_digest)))
    return conditions


def _has_label(name: str, value: str) -> ColumnElement[bool]:
    other = job_labels.alias()
    return exists().where(other.c.job_id == jobs.c.id, other.c.name == name, other.c.value == value)
