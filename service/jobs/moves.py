"""Changes of state, each inside the caller's transaction and each a compare-and-set on the state it leaves.

Rows are locked in one order everywhere, so that PostgreSQL never finds two transactions waiting for each other:
project, job, units, stage, key locks, then units of other jobs that were parked, gates, and at last what is counted (`tallies`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from service.errors import LeaseLost
from service.jobs.clock import UtcNow
from service.jobs.model import (
    FINAL_JOB_STATES,
    FINAL_UNIT_STATES,
    JOB_TRANSITIONS,
    STAGE_TRANSITIONS,
    UNIT_TRANSITIONS,
    JobError,
    JobState,
    Lease,
    StageState,
    UnitKind,
    UnitState,
)
from service.jobs.records import error_row
from service.jobs.tables import events, gates, jobs, key_locks, projects, stages, units

WAITING = (UnitState.READY, UnitState.SENT, UnitState.PARKED)
LIVE = (*WAITING, UnitState.LEASED)
_UNDONE = {"key": None, "outcome": None, "cost": None}


@dataclass(frozen=True)
class Held:
    """A lease that was found good: the rows it stands for, locked. The unit's has the time of that as `now`."""

    job: RowMapping
    unit: RowMapping


def inserting(connection: Connection) -> Any:
    """The database's own `insert`, which knows ON CONFLICT."""
    return postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert


def lock_project(connection: Connection, name: str) -> RowMapping | None:
    """A project's row, nobody else's until the transaction ends."""
    query = select(projects).where(projects.c.name == name).with_for_update(key_share=True)
    return connection.execute(query).mappings().one_or_none()


def lock_job(connection: Connection, job_id: str) -> RowMapping | None:
    """A job's row, nobody else's until the transaction ends: every change to a job, its stages or units begins here."""
    query = select(jobs).where(jobs.c.id == job_id).with_for_update(key_share=True)
    return connection.execute(query).mappings().one_or_none()


def lock_lease(connection: Connection, lease: Lease) -> Held:
    """The rows of a lease. Raises LeaseLost when the unit is another's, or nobody's."""
    job = lock_job(connection, lease.job_id)
    query = select(units, UtcNow().label("now")).where(units.c.id == lease.unit_id, *_held_by(lease))
    unit = connection.execute(query).mappings().one_or_none()
    if job is None or unit is None:
        raise LeaseLost(f"the lease {lease.token} of unit {lease.unit_id} is no longer held", "write nothing more under it")
    return Held(job, unit)


def _held_by(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    return (units.c.token == lease.token, units.c.owner == lease.owner, units.c.state == UnitState.LEASED)


def add_event(connection: Connection, job_id: str, kind: str, stage: str | None, data: Mapping[str, Any]) -> int:
    """Record what happened; the job is locked, so that its events are seen in the order of their ids."""
    row = {"job_id": job_id, "at": UtcNow(), "kind": kind, "stage": stage, "data": dict(data)}
    return int(connection.execute(insert(events).values(row).returning(events.c.id)).scalar_one())


def move_job(connection: Connection, job_id: str, source: Iterable[JobState], to: JobState, **values: Any) -> bool:
    """Change a job's state if it is one of `source`; says whether it was."""
    allowed = tuple(source)
    assert all(to in JOB_TRANSITIONS[state] for state in allowed), (allowed, to)
    statement = update(jobs).where(jobs.c.id == job_id, jobs.c.state.in_(allowed)).values(state=to, **values)
    return connection.execute(statement).rowcount == 1


def move_stage(connection: Connection, stage_id: int, source: Iterable[StageState], to: StageState, **values: Any) -> bool:
    """Change a stage's state if it is one of `source`; says whether it was."""
    allowed = tuple(source)
    assert all(to in STAGE_TRANSITIONS[state] for state in allowed), (allowed, to)
    statement = update(stages).where(stages.c.id == stage_id, stages.c.state.in_(allowed)).values(state=to, **values)
    return connection.execute(statement).rowcount == 1


def move_units(
    connection: Connection, where: ColumnElement[bool], source: Iterable[UnitState], to: UnitState, **values: Any
) -> tuple[int, ...]:
    """Change the state of the units that are in one of `source`; returns the ids of those that were."""
    allowed = tuple(source)
    assert all(to in UNIT_TRANSITIONS[state] for state in allowed), (allowed, to)
    if to in FINAL_UNIT_STATES:
        values.setdefault("finished", UtcNow())
    statement = update(units).where(where, units.c.state.in_(allowed)).values(state=to, **values).returning(units.c.id)
    return tuple(connection.execute(statement).scalars())


def add_unit(connection: Connection, job: RowMapping, stage: RowMapping, kind: UnitKind, name: str = "") -> int:
    """One more unit of an open stage, ready to be handed out."""
    row = {
        "stage_id": stage["id"], "job_id": job["id"], "project": job["project"], "queue": stage["queue"], "kind": kind,
        "name": name, "state": UnitState.READY, "priority": job["priority"], "ready_at": UtcNow(), "sends": 0, "attempts": 0,
        "failures": 0, "token": 0, "done": 0.0, "total": 0.0,
    }  # fmt: skip
    return int(connection.execute(insert(units).values(row).returning(units.c.id)).scalar_one())


def open_stage(connection: Connection, job: RowMapping, stage: RowMapping) -> None:
    """Open a stage: its `whole` unit becomes ready. What an attempt before left of it is put away."""
    source = StageState(stage["state"])
    values = {"done": 0.0, "total": 0.0, "unit": "", "pace_since": None, "started": None, "finished": None}
    moved = move_stage(connection, stage["id"], (source,), StageState.OPEN, **values)
    assert moved, stage
    connection.execute(delete(units).where(units.c.stage_id == stage["id"]))
    add_unit(connection, job, stage, UnitKind.WHOLE)
    add_event(connection, job["id"], "stage", stage["name"], {"state": StageState.OPEN})


def go_back(connection: Connection, job: RowMapping, stage: RowMapping, lost: str, most: int) -> bool:
    """From an open stage back to an earlier one, by name, whose artifact is gone or damaged: it is computed anew.

    False where there is no such stage, or it was opened again `most` times; nothing was changed.
    """
    mine = (stages.c.job_id == job["id"]) & (stages.c.name == lost) & (stages.c.ordinal < stage["ordinal"])
    query = select(stages).where(mine, stages.c.state == StageState.DONE, stages.c.reopened < most)
    maker = connection.execute(query).mappings().one_or_none()
    if maker is None:
        return False
    move_units(connection, units.c.stage_id == stage["id"], LIVE, UnitState.CANCELLED)
    release_keys(connection, stage["id"])
    values = {"done": 0.0, "total": 0.0, "started": None}
    moved = move_stage(connection, stage["id"], (StageState.OPEN,), StageState.PENDING, **values)
    assert moved, stage
    add_event(connection, job["id"], "stage", stage["name"], {"state": StageState.PENDING, "lost": lost})
    counted = {"reopened": maker["reopened"] + 1, **_UNDONE}
    connection.execute(update(stages).where(stages.c.id == maker["id"]).values(**counted))
    open_stage(connection, job, maker)
    return True


def undo_following(connection: Connection, stage: RowMapping) -> None:
    """Stages that were done after this one are to be looked at again: what it made is not what they were computed from."""
    later = (stages.c.job_id == stage["job_id"]) & (stages.c.ordinal > stage["ordinal"])
    for each in connection.execute(select(stages.c.id).where(later, stages.c.state == StageState.DONE)).scalars().all():
        move_stage(connection, each, (StageState.DONE,), StageState.PENDING, **_UNDONE)


def current_stage(connection: Connection, job_id: str) -> RowMapping | None:
    """The first stage that is not done."""
    query = select(stages).where(stages.c.job_id == job_id, stages.c.state != StageState.DONE).order_by(stages.c.ordinal).limit(1)
    return connection.execute(query).mappings().one_or_none()


def end_job(connection: Connection, job: RowMapping, to: JobState, error: JobError | None = None) -> None:
    """Bring a job to its end: nothing of it is handed out or held any more, and what waited for its keys goes on."""
    assert to in FINAL_JOB_STATES, to
    stage = current_stage(connection, job["id"])
    move_units(connection, units.c.job_id == job["id"], LIVE, UnitState.CANCELLED)
    if stage is not None and stage["state"] == StageState.OPEN:
        ended = StageState.FAILED if to is JobState.FAILED else StageState.CANCELLED
        move_stage(connection, stage["id"], (StageState.OPEN,), ended, finished=UtcNow())
        add_event(connection, job["id"], "stage", stage["name"], {"state": ended, **_told(error)})
        release_keys(connection, stage["id"])
    callback = {"callback_state": "pending", "callback_at": UtcNow(), "callback_attempts": 0} if job["callback_url"] else {}
    values = {"finished": UtcNow(), "error": error_row(error) if error else None, **callback}
    moved = move_job(connection, job["id"], (JobState(job["state"]),), to, **values)
    assert moved, job["id"]
    pending = (gates.c.job_id == job["id"]) & (gates.c.state == "pending")
    connection.execute(update(gates).where(pending).values(due=UtcNow()))
    add_event(connection, job["id"], "job", None, {"state": to, **_told(error)})


def hold_gates(connection: Connection, job_id: str) -> bool:
    """A job is tried again: gates on it that nobody has judged wait for its end anew. Whether there are any."""
    pending = (gates.c.job_id == job_id) & (gates.c.state == "pending")
    return connection.execute(update(gates).where(pending).values(due=None, attempts=0)).rowcount > 0


def cancel_if_asked(connection: Connection, job: RowMapping) -> bool:
    """End a job that is to be cancelled once no worker holds a unit of it; says whether a cancel was asked for."""
    if not job["cancel_requested"]:
        return False
    move_units(connection, units.c.job_id == job["id"], WAITING, UnitState.CANCELLED)
    leased = select(units.c.id).where(units.c.job_id == job["id"], units.c.state == UnitState.LEASED).limit(1)
    if connection.execute(leased).first() is None:
        end_job(connection, job, JobState.CANCELLED)
    return True


def release_keys(connection: Connection, stage_id: int) -> tuple[int, ...]:
    """Give up the cache keys that a stage holds; returns the units of other jobs that waited and are ready now."""
    held = delete(key_locks).where(key_locks.c.unit_id.in_(select(units.c.id).where(units.c.stage_id == stage_id)))
    freed = connection.execute(held.returning(key_locks.c.project, key_locks.c.stage, key_locks.c.key)).all()
    return tuple(unit for project, stage, key in freed for unit in unpark(connection, project, stage, key))


def unpark(connection: Connection, project: str, stage: str, key: str) -> tuple[int, ...]:
    """Make the units ready that wait for a key."""
    same_stage = units.c.stage_id.in_(select(stages.c.id).where(stages.c.key == key, stages.c.name == stage))
    where = (units.c.project == project) & (units.c.key == key) & same_stage
    return move_units(connection, where, (UnitState.PARKED,), UnitState.READY, ready_at=UtcNow())


def _told(error: JobError | None) -> dict[str, Any]:
    return {"error": error_row(error)} if error else {}
