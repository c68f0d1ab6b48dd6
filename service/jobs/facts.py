"""Figures for metrics and operators, from SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection, Engine, Row, func, literal, select, union_all

from service.errors import Unavailable
from service.infra.metrics import ServiceFacts
from service.jobs import moves
from service.jobs.clock import UtcNow
from service.jobs.database import reading
from service.jobs.gate_model import VERDICTS, GateState
from service.jobs.model import FINAL_JOB_STATES, QUEUES, JobState, UnitState
from service.jobs.requests import QueueFacts
from service.jobs.tables import counters, gates, jobs, units
from service.jobs.tallies import tallied


class Facts:
    """How much there is of what."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def job_counts(self) -> dict[JobState, int]:
        """Jobs in each state, over all projects. Raises Unavailable."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(jobs.c.state, func.count().label("jobs")).group_by(jobs.c.state)).all()
        return dict.fromkeys(JobState, 0) | {JobState(row.state): row.jobs for row in rows}

    def queue_facts(self) -> tuple[QueueFacts, ...]:
        """How every queue stands. Raises Unavailable."""
        since = func.min(units.c.ready_at).label("since")
        columns = (units.c.queue, units.c.state, func.count().label("units"), since, UtcNow().label("now"))
        live = units.c.state.in_(moves.LIVE) & units.c.queue.in_(QUEUES)
        with reading(self._engine) as connection:
            rows = connection.execute(select(*columns).where(live).group_by(units.c.queue, units.c.state)).all()
        return tuple(_facts(queue, [row for row in rows if row.queue == queue]) for queue in QUEUES)

    def facts(self) -> ServiceFacts | None:
        """All figures of the metrics page; None while the database cannot be reached."""
        try:
            queues = self.queue_facts()
            with reading(self._engine) as connection:
                rows = connection.execute(_TALLY).all()
                runs = tallied(connection)
                gated = connection.execute(_PENDING).one()
        except Unavailable:
            return None
        now = {JobState(row.name): row for row in rows if row.is_state}
        counted = {row.name: row.number for row in rows if not row.is_state}
        running = now[JobState.RUNNING].number if JobState.RUNNING in now else 0
        entered = _entered({state: row.number for state, row in now.items()}, sum(row.started for row in now.values()), counted)
        resent = {queue: counted.get(f"messages_resent_{queue}", 0) for queue in QUEUES}
        decided: dict[str, int] = {verdict: counted.get(f"gates_{verdict}", 0) for verdict in VERDICTS}
        pending = {"audit": gated.pending - gated.due, "judge": gated.due}
        expired = counted.get("lease_expired", 0)
        return ServiceFacts(entered, running, queues, expired, resent, runs, decided, pending)


# One statement, so that one moment: a counter that is read a little lower than before would look like a restart.
_TALLY = union_all(
    select(
        literal(True).label("is_state"), jobs.c.state.label("name"), func.count().label("number"),
        func.count(jobs.c.started).label("started"),
    ).group_by(jobs.c.state),
    select(literal(False), counters.c.name, counters.c.value, literal(0)),
)  # fmt: skip

_PENDING = select(func.count().label("pending"), func.count(gates.c.due).label("due")).where(gates.c.state == GateState.PENDING)


def count_retry(connection: Connection, source: JobState, started: bool) -> None:
    """A job leaves a final state; last in its transaction, since every retry comes by the same rows."""
    count(connection, f"left_{source}", 1)
    count(connection, "started_before", int(started))


def _entered(now: Mapping[JobState, int], started: int, counted: Mapping[str, int]) -> dict[str, int]:
    """How often a job entered each state: those that are in it or went on from it, and those that came again by a retry."""
    left = {state: counted.get(f"left_{state}", 0) for state in FINAL_JOB_STATES}
    entered = {state.value: now.get(state, 0) + left[state] for state in FINAL_JOB_STATES}
    queued = sum(now.values()) + sum(left.values())
    return {**entered, JobState.QUEUED.value: queued, JobState.RUNNING.value: started + counted.get("started_before", 0)}


def count(connection: Connection, name: str, more: int) -> None:
    """Add to a counter that outlives every process."""
    if more:
        statement = moves.inserting(connection)(counters).values(name=name, value=more)
        added = {"value": counters.c.value + more}
        connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=added))


def _facts(queue: str, rows: Sequence[Row[tuple[str, str, int, datetime, datetime]]]) -> QueueFacts:
    counts = {row.state: row.units for row in rows}
    waits = [(row.now - row.since).total_seconds() for row in rows if row.state in (UnitState.READY, UnitState.SENT)]
    named = {state.value: counts.get(state, 0) for state in moves.LIVE}
    return QueueFacts(queue, oldest_seconds=max([0.0, *waits]), **named)
