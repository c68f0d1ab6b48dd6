"""No page of a listing, and no look of the dispatcher, reads all the jobs there are: asked of the databases' planners."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from service.jobs.database import reading, writing
from service.jobs.model import JobKind, JobState
from service.jobs.outlook import past_stages
from service.jobs.requests import JobQuery
from tests.helpers.databases import Database

STORED = 100_000
RECENT = STORED // 1000

# Of every thousand jobs one is queued and one has the label env=rare; each has one open or ended stage and one unit.
FILL = (
    """INSERT INTO jobs (id, project, kind, state, priority, labels, spec, body_digest, submitted_by, created, cancel_requested,
       inputs, verdict_reason, gpu_seconds, attempt, callback_attempts)
       SELECT id, 'default', CASE WHEN n % 10 = 0 THEN 'train-rm' ELSE 'audit' END,
              CASE WHEN n % 1000 = 0 THEN 'queued' ELSE 'succeeded' END, 0, '{}', '{}', '', '', at, {false}, '{}', '', 0, 1, 0
       FROM ({numbers}) AS numbered""",
    """INSERT INTO job_labels (job_id, name, value, project, created)
       SELECT id, 'env', CASE WHEN n % 1000 = 1 THEN 'rare' ELSE 'common' END, 'default', at FROM ({numbers}) AS numbered""",
    """INSERT INTO stages (job_id, ordinal, name, queue, state, done, total, unit, reopened)
       SELECT id, 0, 'prepare', 'cpu', CASE WHEN n % 1000 = 0 THEN 'open' ELSE 'done' END, 0, 0, '', 0
       FROM ({numbers}) AS numbered""",
    """INSERT INTO units (stage_id, job_id, project, queue, kind, name, state, priority, ready_at, sends, attempts, failures,
       token, done, total)
       SELECT stages.id, job_id, 'default', 'cpu', 'whole', '', CASE WHEN stages.state = 'open' THEN 'ready' ELSE 'done' END,
              0, jobs.created, 0, 0, 0, 0, 0, 0 FROM stages JOIN jobs ON jobs.id = stages.job_id""",
    """INSERT INTO job_inputs (job_id, role, digest) SELECT id, 'model', id FROM jobs""",
    """INSERT INTO events (job_id, at, kind, data) SELECT id, created, 'job', '{}' FROM jobs""",
)
NUMBERS = {
    "sqlite": f"""WITH RECURSIVE counted(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counted WHERE n < {STORED})
        SELECT n, printf('%026d', n) AS id,
               strftime('%Y-%m-%d %H:%M:%f000', '2026-01-01', printf('+%d seconds', n)) AS at FROM counted""",
    "postgresql": f"""SELECT n, lpad(n::text, 26, '0') AS id, timestamptz '2026-01-01 00:00:00Z' + n * interval '1 second' AS at
        FROM generate_series(1, {STORED}) AS n""",
}


def fill(db: Database) -> None:
    name = db.engine.dialect.name
    with writing(db.engine) as connection:
        for statement in FILL:
            false = "0" if name == "sqlite" else "false"
            given = statement.replace("{numbers}", NUMBERS[name]).replace("{false}", false)
            connection.exec_driver_sql(given.replace("%", "%%") if name == "postgresql" else given)
    if name == "postgresql":  # its planner goes by figures that it gathers itself, in time; SQLite's only when it is told to
        with writing(db.engine) as connection:
            connection.execute(text("ANALYZE"))


@contextmanager
def statements(db: Database) -> Iterator[list[tuple[str, Any]]]:
    """The queries that are sent meanwhile."""
    seen: list[tuple[str, Any]] = []

    def note(_: Connection, __: object, statement: str, parameters: object, ___: object, ____: object) -> None:
        if statement.lstrip().startswith(("SELECT", "WITH")):
            seen.append((statement, parameters))

    event.listen(db.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(db.engine, "before_cursor_execute", note)


def plans(db: Database, ask: Callable[[], object]) -> str:
    """What the planner says of every query of a call."""
    with statements(db) as seen:
        ask()
    assert seen
    explain = "EXPLAIN QUERY PLAN " if db.engine.dialect.name == "sqlite" else "EXPLAIN "
    with reading(db.engine) as connection:
        return "\n".join(
            str(row[-1]) for query, given in list(seen) for row in connection.exec_driver_sql(explain + query, given)
        )


def whole_scans(db: Database, plan: str) -> list[str]:
    """Lines that read a whole table, or a whole index, of those that grow with the jobs."""
    grows = ("jobs", "job_labels", "stages", "units", "events", "job_inputs")
    if db.engine.dialect.name == "sqlite":
        return [line for line in plan.splitlines() if line.startswith(tuple(f"SCAN {table}" for table in grows))]
    return [line for line in plan.splitlines() if any(f"Seq Scan on {table}" in line for table in grows)]


QUERIES = {
    "everything": JobQuery(),
    "kind": JobQuery(kind=JobKind.AUDIT),
    "common state": JobQuery(states=(JobState.SUCCEEDED,)),
    "rare states": JobQuery(states=(JobState.QUEUED, JobState.RUNNING)),
    "common label": JobQuery(labels={"env": "common"}),
    "rare label": JobQuery(labels={"env": "rare"}),
    "label and state": JobQuery(labels={"env": "rare"}, states=(JobState.SUCCEEDED,)),
    "stage": JobQuery(stage="prepare"),
    "input": JobQuery(input_digest="d" * 64),
}


@pytest.mark.full
def test_with_many_jobs_no_question_reads_them_all(db: Database) -> None:
    fill(db)
    for name, query in QUERIES.items():
        first = db.store.find("default", query)
        assert len(first.items) == (0 if name == "input" else 50), name
        for cursor in (None, first.next):
            plan = plans(db, lambda query=query, cursor=cursor: db.store.find("default", query, cursor))  # type: ignore[misc]
            assert not whole_scans(db, plan), (name, plan)
    queued = db.store.find("default", JobQuery(states=(JobState.QUEUED,))).items[0]
    questions: dict[str, Callable[[], object]] = {
        "ready": lambda: db.store.ready_units("cpu", 4),
        "position": lambda: db.store.queue_position(queued),
        "facts": db.store.queue_facts,
        "get": lambda: db.store.get("default", queued.id),
        "stages": lambda: db.store.stages(queued.id),
        "events": lambda: db.store.events(queued.id),
        "input": lambda: db.store.jobs_of_input("default", "d" * 64),
        "outlook": lambda: past_stages(db.engine, "default"),
    }
    for name, ask in questions.items():
        plan = plans(db, ask)
        assert not whole_scans(db, plan), (name, plan)
    assert db.store.queue_position(queued) == RECENT


@pytest.mark.parametrize("database_url", [None])  # PostgreSQL plans by the data: see the test with many jobs
@pytest.mark.parametrize("name", [name for name in QUERIES if name not in ("stage", "input")])
def test_a_page_walks_an_index_in_its_order(db: Database, name: str) -> None:
    plan = plans(db, lambda: db.store.find("default", QUERIES[name]))
    assert "SEARCH" in plan
    assert not whole_scans(db, plan), plan
    assert "TEMP B-TREE" not in plan, plan


@pytest.mark.parametrize("database_url", [None])
def test_what_others_took_is_looked_up_by_indices(db: Database) -> None:
    plan = plans(db, lambda: past_stages(db.engine, "default"))
    assert plan.count("SEARCH") == 2
    assert not whole_scans(db, plan), plan
    assert "TEMP B-TREE" not in plan, plan
