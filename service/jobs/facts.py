"""Figures for metrics and operators, from SQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, Engine, Row, func, select

from service.errors import Unavailable
from service.infra.metrics import ServiceFacts
from service.jobs import moves
from service.jobs.clock import UtcNow
from service.jobs.database import reading
from service.jobs.model import JobState, UnitState
from service.jobs.requests import QueueFacts
from service.jobs.tables import counters, jobs, units

QUEUES = ("cpu", "gpu")


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
            with reading(self._engine) as connection:
                counted = {row.name: row.value for row in connection.execute(select(counters))}
            queues = self.queue_facts()
            states = {state.value: number for state, number in self.job_counts().items()}
        except Unavailable:
            return None
        return ServiceFacts(states, queues, counted.get("lease_expired", 0), counted.get("messages_resent", 0))


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
