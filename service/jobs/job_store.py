"""The side of the job store that clients see: submit, look, cancel, retry, delete."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, func, insert, select, update

from service.errors import Conflict, NotFound, QuotaExceeded
from service.infra.settings import Settings
from service.jobs import audit_log, moves
from service.jobs.clock import UtcNow
from service.jobs.database import reading, writing
from service.jobs.facts import count_retry
from service.jobs.gate_model import AWAITED
from service.jobs.ids import new_id
from service.jobs.model import FINAL_JOB_STATES, EventRecord, JobKind, JobRecord, JobState, StageRecord, StageState, UnitState
from service.jobs.records import event_of, job_of, stage_of, unit_of
from service.jobs.requests import NewJob, Submitted, UnitRecord, Usage
from service.jobs.tables import artifact_refs, events, job_inputs, job_labels, jobs, stages, units, uploads

EVENTS_AT_ONCE = 1000
_KEPT_SECONDS = 60.0


class JobRequests:
    """Jobs as their owners see them. Every method is one transaction and may raise Unavailable."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._kept: dict[str, tuple[float, int]] = {}

    def submit(self, project: str, new: NewJob) -> Submitted:
        """Store a job; its first stage opens with it.

        Raises:
            Conflict: the idempotency key was used for another request.
            QuotaExceeded: the project has as many jobs queued, or bytes stored, as it may.
            NotFound: there is no such project.
        """
        kept = self.kept_bytes(project)
        with writing(self._engine) as connection:
            limits = moves.lock_project(connection, project)
            if limits is None:
                raise NotFound(f"there is no project {project!r}")
            return self.submit_in(connection, limits, new, kept)

    def submit_in(self, connection: Connection, limits: RowMapping, new: NewJob, kept: int) -> Submitted:
        """`submit` within the caller's transaction.

        Args:
            limits: the project's row, locked; kept: its `kept_bytes`, from before the transaction.
        """
        project = limits["name"]
        budgets = [each for each in (limits["gpu_seconds_per_job"], new.gpu_seconds_budget) if each is not None]
        row = self._insert(connection, project, new, min(budgets, default=None))
        if row is None:
            return Submitted(self._same_request(connection, project, new), created=False)
        check_bytes(kept, limits, added=0)
        _check_queue(connection, limits)
        _add_stages(connection, row, new)
        _add_labels(connection, row, new)
        put_inputs(connection, row["id"], new.inputs)
        return Submitted(job_of(row), created=True)

    def _insert(self, connection: Connection, project: str, new: NewJob, budget: float | None) -> RowMapping | None:
        row = {
            "id": new_id(), "project": project, "kind": new.kind, "state": JobState.QUEUED, "priority": new.priority,
            "labels": dict(new.labels), "spec": dict(new.spec), "callback_url": new.callback_url,
            "idempotency_key": new.idempotency_key, "body_digest": new.body_digest, "submitted_by": new.submitted_by,
            "created": UtcNow(), "cancel_requested": False, "inputs": dict(new.inputs), "gpu_seconds": 0.0,
            "verdict_reason": JobRecord.verdict_reason, "gpu_seconds_budget": budget, "attempt": 1, "callback_attempts": 0,
        }  # fmt: skip
        statement = moves.inserting(connection)(jobs).values(row).on_conflict_do_nothing(
            index_elements=["project", "idempotency_key"]
        )  # fmt: skip
        found: RowMapping | None = connection.execute(statement.returning(*jobs.c)).mappings().one_or_none()
        return found

    def _same_request(self, connection: Connection, project: str, new: NewJob) -> JobRecord:
        query = select(jobs).where(jobs.c.project == project, jobs.c.idempotency_key == new.idempotency_key)
        row = connection.execute(query).mappings().one()
        if row["body_digest"] != new.body_digest:
            raise Conflict(
                f"the idempotency key was used for another request (job {row['id']})", "use a new key for a new request"
            )
        return job_of(row)

    def get(self, project: str, job_id: str) -> JobRecord:
        """One job. Raises NotFound, also for another project's or a deleted one."""
        with reading(self._engine) as connection:
            query = select(jobs).where(jobs.c.id == job_id, jobs.c.project == project, jobs.c.deleted.is_(None))
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise NotFound(f"there is no job {job_id!r}", "see `safer-audit list`")
        return job_of(row)

    def job(self, job_id: str) -> JobRecord:
        """One job by its id alone, for workers. Raises NotFound."""
        with reading(self._engine) as connection:
            row = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one_or_none()
        if row is None:
            raise NotFound(f"there is no job {job_id!r}")
        return job_of(row)

    def stages(self, job_id: str) -> tuple[StageRecord, ...]:
        """The stages of a job, in order."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(stages).where(stages.c.job_id == job_id).order_by(stages.c.ordinal)).mappings()
            return tuple(stage_of(row) for row in rows)

    def units(self, job_id: str) -> tuple[UnitRecord, ...]:
        """The units of a job, in the order they were made."""
        query = select(units, stages.c.name.label("stage")).join(stages, stages.c.id == units.c.stage_id)
        with reading(self._engine) as connection:
            rows = connection.execute(query.where(units.c.job_id == job_id).order_by(units.c.id)).mappings()
            return tuple(unit_of(row) for row in rows)

    def queue_position(self, job: JobRecord) -> int | None:
        """1 for the job that is next in its queue by priority and age; None when it waits in none.

        An estimate: fair share between projects, quotas and pauses after an error may change the order.
        """
        waiting = units.c.state.in_((UnitState.READY, UnitState.SENT))
        with reading(self._engine) as connection:
            query = select(units).where(units.c.job_id == job.id, waiting).order_by(units.c.id).limit(1)
            unit = connection.execute(query).mappings().one_or_none()
            if unit is None:
                return None
            age = (jobs.c.created < job.created) | ((jobs.c.created == job.created) & (jobs.c.id < job.id))
            first = (units.c.priority > unit["priority"]) | ((units.c.priority == unit["priority"]) & age)
            ahead = select(func.count(units.c.job_id.distinct())).join(jobs, jobs.c.id == units.c.job_id)
            count = connection.execute(ahead.where(units.c.queue == unit["queue"], waiting, first)).scalar_one()
        return int(count) + 1

    def request_cancel(self, project: str, job_id: str, actor: str) -> JobRecord:
        """Cancel a job: what waits ends now, what a worker holds ends with its next heartbeat.

        Raises:
            NotFound, Conflict: the job has ended in another way.
        """
        with writing(self._engine) as connection:
            job = _own(connection, project, job_id)
            if job["state"] == JobState.CANCELLED or job["cancel_requested"]:
                return job_of(job)
            if job["state"] in FINAL_JOB_STATES:
                raise Conflict(f"the job has {job['state']} already", "only a queued or running job can be cancelled")
            audit_log.append(connection, project, actor, "job.cancel", job_id)
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(cancel_requested=True))
            moves.add_event(connection, job_id, "cancel", None, {})
            moves.cancel_if_asked(connection, _locked(connection, job_id))
            return job_of(_locked(connection, job_id))

    def retry(self, project: str, job_id: str, actor: str) -> JobRecord:
        """Queue a failed or cancelled job again; stages that are done stay done.

        Raises:
            NotFound, Conflict: the job has not failed and was not cancelled.
            QuotaExceeded: the project has as many jobs queued as it may.
        """
        with writing(self._engine) as connection:
            limits = moves.lock_project(connection, project)
            job = _own(connection, project, job_id)
            if limits is None or job["state"] not in (JobState.FAILED, JobState.CANCELLED):
                raise Conflict(f"the job is {job['state']}", "only a failed or cancelled job can be tried again")
            values = {"attempt": job["attempt"] + 1, "error": None, "started": None, "finished": None, "cancel_requested": False}
            awaited = moves.hold_gates(connection, job_id)
            unjudged = {"verdict": None, "verdict_reason": AWAITED if awaited else JobRecord.verdict_reason}
            source = (JobState(job["state"]),)
            moves.move_job(connection, job_id, source, JobState.QUEUED, callback_state=None, **values, **unjudged)
            _check_queue(connection, limits)
            audit_log.append(connection, project, actor, "job.retry", job_id)
            moves.add_event(connection, job_id, "job", None, {"state": JobState.QUEUED, "attempt": values["attempt"]})
            connection.execute(update(stages).where(stages.c.job_id == job_id).values(reopened=0))
            stage = moves.current_stage(connection, job_id)
            assert stage is not None, job_id
            again = _locked(connection, job_id)
            moves.open_stage(connection, again, stage)
            count_retry(connection, *source, started=job["started"] is not None)
            return job_of(again)

    def delete(self, project: str, job_id: str, actor: str) -> None:
        """Take a job that has ended out of sight; what only it used may be collected.

        Raises:
            NotFound, Conflict: the job has not ended.
        """
        with writing(self._engine) as connection:
            job = _own(connection, project, job_id)
            if job["state"] not in FINAL_JOB_STATES:
                raise Conflict(f"the job is {job['state']}", "cancel it first")
            audit_log.append(connection, project, actor, "job.delete", job_id)
            gone = update(jobs).where(jobs.c.id == job_id).values(deleted=UtcNow(), idempotency_key=None, callback_state=None)
            connection.execute(gone)
            for table in (artifact_refs, job_inputs, job_labels):
                connection.execute(table.delete().where(table.c.job_id == job_id))

    def add_event(self, job_id: str, kind: str, stage: str | None, data: Mapping[str, Any]) -> int:
        """Record something that happened to a job; returns its id. Raises NotFound."""
        with writing(self._engine) as connection:
            _locked(connection, job_id)
            return moves.add_event(connection, job_id, kind, stage, data)

    def events(self, job_id: str, after: int = 0, limit: int = EVENTS_AT_ONCE) -> tuple[EventRecord, ...]:
        """Events of a job with an id above `after`, in order."""
        query = select(events).where(events.c.job_id == job_id, events.c.id > after).order_by(events.c.id).limit(limit)
        with reading(self._engine) as connection:
            return tuple(event_of(row) for row in connection.execute(query).mappings())

    def last_event(self, job_id: str, kind: str) -> EventRecord | None:
        """The last event of a kind of a job."""
        query = select(events).where(events.c.job_id == job_id, events.c.kind == kind).order_by(events.c.id.desc()).limit(1)
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return event_of(row) if row is not None else None

    def jobs_of_input(self, project: str, digest: str, limit: int = 1000) -> tuple[JobRecord, ...]:
        """Jobs of a project that use a model or dataset, newest first."""
        uses = jobs.c.id.in_(select(job_inputs.c.job_id).where(job_inputs.c.digest == digest))
        query = select(jobs).where(jobs.c.project == project, jobs.c.deleted.is_(None), uses)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(jobs.c.created.desc(), jobs.c.id.desc()).limit(limit)).mappings()
            return tuple(job_of(row) for row in rows)

    def usage(self, project: str) -> Usage:
        """What a project uses of its limits."""
        with reading(self._engine) as connection:
            running, queued = (_count(connection, project, state) for state in (JobState.RUNNING, JobState.QUEUED))
            return Usage(running, queued, kept_bytes(connection, project))

    def kept_bytes(self, project: str) -> int:
        """Bytes that a project keeps, as they were at most a minute ago."""
        # Adding up all artifacts of a project takes long where there are many; a limit of bytes need not be exact to the minute.
        at, found = self._kept.get(project, (-math.inf, 0))
        if time.monotonic() - at > _KEPT_SECONDS:
            with reading(self._engine) as connection:
                found = kept_bytes(connection, project)
            self._kept[project] = (time.monotonic(), found)
        return found


def put_inputs(connection: Connection, job_id: str, inputs: Mapping[str, str]) -> None:
    """Record the digests of a job's inputs, by role; a role told twice keeps the last. `role.detail` is no digest."""
    for role, digest in inputs.items():
        if "." in role:
            continue
        statement = moves.inserting(connection)(job_inputs).values(job_id=job_id, role=role, digest=digest)
        connection.execute(statement.on_conflict_do_update(index_elements=["job_id", "role"], set_={"digest": digest}))


def kept_bytes(connection: Connection, project: str) -> int:
    """Bytes of a project's uploads and artifacts; an artifact that several jobs share counts once."""
    one = (
        select(func.max(artifact_refs.c.bytes).label("bytes"))
        .where(artifact_refs.c.project == project)
        .group_by(artifact_refs.c.stage, artifact_refs.c.key)
        .subquery()
    )
    artifacts = connection.execute(select(func.coalesce(func.sum(one.c.bytes), 0))).scalar_one()
    kept = (uploads.c.project == project) & (uploads.c.state != "removed")
    uploaded = connection.execute(select(func.coalesce(func.sum(uploads.c.bytes), 0)).where(kept)).scalar_one()
    return int(artifacts) + int(uploaded)


def check_bytes(kept: int, limits: RowMapping, added: int) -> None:
    """Raises QuotaExceeded when a project would keep more bytes than it may."""
    if kept + added > limits["max_bytes"]:
        raise QuotaExceeded(
            f"project {limits['name']!r} keeps {kept} bytes; {added} more would exceed {limits['max_bytes']}",
            "delete jobs or uploads that are not needed, or ask for a larger quota",
        )


def _count(connection: Connection, project: str, state: JobState) -> int:
    query = select(func.count()).select_from(jobs).where(jobs.c.project == project, jobs.c.state == state)
    return int(connection.execute(query).scalar_one())


def _check_queue(connection: Connection, limits: RowMapping) -> None:
    if _count(connection, limits["name"], JobState.QUEUED) > limits["max_queued"]:
        raise QuotaExceeded(
            f"project {limits['name']!r} has {limits['max_queued']} jobs queued", "wait until some have run, or cancel some"
        )


def _add_stages(connection: Connection, job: RowMapping, new: NewJob) -> None:
    assert new.stages, "a job without stages"
    zero = {"state": StageState.PENDING, "done": 0.0, "total": 0.0, "unit": "", "reopened": 0}
    rows = [
        {"job_id": job["id"], "ordinal": place, "name": part.name, "queue": part.queue, **zero}
        for place, part in enumerate(new.stages)
    ]
    connection.execute(insert(stages), rows)
    moves.add_event(connection, job["id"], "job", None, {"state": JobState.QUEUED, "kind": JobKind(new.kind)})
    first = moves.current_stage(connection, job["id"])
    assert first is not None
    moves.open_stage(connection, job, first)


def _add_labels(connection: Connection, job: RowMapping, new: NewJob) -> None:
    rows = [
        {"job_id": job["id"], "name": name, "value": value, "project": job["project"], "created": job["created"]}
        for name, value in new.labels.items()
    ]
    if rows:
        connection.execute(insert(job_labels), rows)


def _own(connection: Connection, project: str, job_id: str) -> RowMapping:
    job = moves.lock_job(connection, job_id)
    if job is None or job["project"] != project or job["deleted"] is not None:
        raise NotFound(f"there is no job {job_id!r}", "see `safer-audit list`")
    return job


def _locked(connection: Connection, job_id: str) -> RowMapping:
    job = moves.lock_job(connection, job_id)
    if job is None:
        raise NotFound(f"there is no job {job_id!r}")
    return job
