"""The gates' table: creating, finding, judging once. Read `service.jobs.gate_model` first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, RowMapping, Select, and_, func, insert, or_, select, update

from safer_engine.gate.baselines import label_of
from service.errors import Conflict, NotFound, QuotaExceeded
from service.jobs import moves
from service.jobs.clock import UtcNow, utc_after
from service.jobs.cursors import Place, read_place
from service.jobs.database import reading, writing
from service.jobs.deliveries import add_deliveries, release_deliveries
from service.jobs.facts import count
from service.jobs.gate_model import AWAITED, CreatedGate, GateQuery, GateRecord, GateState, NewGate, Outcome, TakenGate
from service.jobs.ids import is_id, new_id
from service.jobs.model import FINAL_JOB_STATES, JobKind, JobState
from service.jobs.records import error_of, error_row, job_of
from service.jobs.requests import JobQuery, NewJob, Page
from service.jobs.store import JobStore
from service.jobs.tables import events, gates, jobs

JUDGE_SECONDS = 180.0
"""Who took a gate and has not decided it after this is taken for dead: the gate is due again."""
MAX_PAGE = 500
_LISTED = tuple(gates.c[name] for name in GateRecord.__dataclass_fields__)


class GateStore:
    """Gates of all projects. Safe for threads; every method is one or more transactions and may raise Unavailable.

    Args:
        judge_seconds: how long a gate that was taken is left alone.
    """

    def __init__(self, engine: Engine, job_store: JobStore, judge_seconds: float = JUDGE_SECONDS) -> None:
        self._engine = engine
        self._jobs = job_store
        self._judge_seconds = judge_seconds

    def create(self, project: str, new: NewGate, audit: str | NewJob) -> CreatedGate:
        """Store a gate on an audit: on one that exists (its id), or on one that is submitted with it, in one transaction.

        A gate on an audit that has ended is due at once; any other when its audit ends.

        Raises:
            Conflict: the idempotency key was used for another request; the job is no audit.
            QuotaExceeded: as many jobs queued, or gates pending, as the project may have.
            NotFound: there is no such project, or no such audit in it.
        """
        kept = 0 if isinstance(audit, str) else self._jobs.kept_bytes(project)
        with writing(self._engine) as connection:
            limits = moves.lock_project(connection, project)
            if limits is None:
                raise NotFound(f"there is no project {project!r}")
            if (before := _same_request(connection, project, new.idempotency_key, new.body_digest)) is not None:
                return CreatedGate(before, created=False)
            _check_pending(connection, limits)
            job_id = audit if isinstance(audit, str) else self._jobs.submit_in(connection, limits, audit, kept).job.id
            job = _audit(connection, project, job_id)
            row = _insert(connection, project, job, new)
            add_deliveries(connection, row["id"], new.deliveries)
            unjudged = (jobs.c.id == job_id) & jobs.c.verdict.is_(None)
            connection.execute(update(jobs).where(unjudged).values(verdict_reason=AWAITED))
            return CreatedGate(_gate(row), created=True)

    def earlier(self, project: str, key: str | None, body_digest: str) -> GateRecord | None:
        """The gate that the same request stored before, by its idempotency key. Raises Conflict: it was another request."""
        with reading(self._engine) as connection:
            return _same_request(connection, project, key, body_digest)

    def baseline(self, project: str, text: str, own: str | None = None) -> str:
        """The finished audit that a baseline names now: by id, by `label:NAME=VALUE`, or by `label:X` for `label:alias=X`.

        Args:
            own: the audit to be judged, which is never its own baseline by label.

        Raises:
            NotFound: there is none. Conflict: it is no audit, or has not succeeded. SpecError: the words cannot be read.
        """
        label = label_of(text)
        if label is None:
            job = self._jobs.get(project, text) if is_id(text) else None
            if job is None:
                raise NotFound(f"there is no audit {text[:40]!r} to be the baseline", "name it by its id, or by label:NAME=VALUE")
            if not job.kind.reports or job.state is not JobState.SUCCEEDED:
                raise Conflict(
                    f"the baseline {text} is no finished audit: {job.kind}, {job.state}", "wait until it has succeeded"
                )
            return job.id
        wanted = JobQuery(states=(JobState.SUCCEEDED,), kind=JobKind.AUDIT, labels=dict([label]))
        found = [job.id for job in self._jobs.find(project, wanted, limit=2).items if job.id != own]
        if not found:
            raise NotFound(
                f"no finished audit has the label {label[0]}={label[1]}", "submit the baseline with that label, or name its id"
            )
        return found[0]

    def get(self, project: str, gate_id: str) -> GateRecord:
        """One gate. Raises NotFound, also for another project's."""
        query = select(*_LISTED).where(gates.c.id == gate_id, gates.c.project == project)
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise NotFound(f"there is no gate {gate_id!r}", "a job's id goes with `gate --audit`; GET /v1/gates lists gates")
        return _gate(row)

    def record(self, gate_id: str) -> GateRecord:
        """One gate by its id alone, for those who deliver its verdict. Raises NotFound."""
        with reading(self._engine) as connection:
            row = connection.execute(select(*_LISTED).where(gates.c.id == gate_id)).mappings().one_or_none()
        if row is None:
            raise NotFound(f"there is no gate {gate_id!r}")
        return _gate(row)

    def decision(self, gate_id: str) -> str | None:
        """What `safer-audit gate --json` would have printed; None while pending, and where nothing could be judged."""
        with reading(self._engine) as connection:
            return connection.execute(select(gates.c.decision).where(gates.c.id == gate_id)).scalar_one_or_none()

    def policy(self, gate_id: str) -> dict[str, Any]:
        """The policy of a gate, whole. Raises NotFound."""
        with reading(self._engine) as connection:
            found: dict[str, Any] | None = connection.execute(
                select(gates.c.policy).where(gates.c.id == gate_id)
            ).scalar_one_or_none()
        if found is None:
            raise NotFound(f"there is no gate {gate_id!r}")
        return found

    def find(self, project: str, query: GateQuery = GateQuery(), cursor: str | None = None, limit: int = 50) -> Page[GateRecord]:  # noqa: B008 - frozen
        """Gates of a project, newest first. Raises SpecError for a cursor that no page gave."""
        size = max(1, min(limit, MAX_PAGE))
        after = read_place(cursor) if cursor else None
        with reading(self._engine) as connection:
            rows = connection.execute(_listing(project, query, after).limit(size + 1)).mappings().all()
        found = tuple(_gate(row) for row in rows[:size])
        return Page(found, Place(found[-1].created, found[-1].id).written() if len(rows) > size else None)

    def take(self) -> TakenGate | None:
        """A gate to judge now, which nobody else is given for `judge_seconds`; None where none is due."""
        due = (gates.c.state == GateState.PENDING) & (gates.c.due <= UtcNow())
        with reading(self._engine) as connection:
            found = connection.execute(select(gates.c.id).where(due).order_by(gates.c.due).limit(20)).scalars().all()
        taken = {"due": utc_after(self._judge_seconds), "attempts": gates.c.attempts + 1}
        for gate_id in found:
            with writing(self._engine) as connection:
                mine = update(gates).where(gates.c.id == gate_id, due).values(**taken).returning(*gates.c, UtcNow().label("now"))
                row = connection.execute(mine).mappings().one_or_none()
                if row is None:
                    continue
                job = connection.execute(select(jobs).where(jobs.c.id == row["job_id"])).mappings().one()
                return TakenGate(_gate(row), row["policy"], job_of(job), row["attempts"], row["now"])
        return None

    def put_back(self, taken: TakenGate, seconds: float, *, counts: bool = False) -> None:
        """It could not be judged now: again in so many seconds. `counts`: whether this time is one of the attempts."""
        mine = (gates.c.id == taken.gate.id) & (gates.c.state == GateState.PENDING) & (gates.c.attempts == taken.attempts)
        values = {"due": utc_after(seconds), "attempts": taken.attempts - (0 if counts else 1)}
        with writing(self._engine) as connection:
            connection.execute(update(gates).where(mine & gates.c.due.is_not(None)).values(**values))

    def decide(self, taken: TakenGate, outcome: Outcome) -> bool:
        """Write the decision, tell the job of it and release the deliveries, in one transaction.

        False, and nothing is changed, where another was first, the job has been tried again since, or a purge has taken away
        what was read (it is judged anew then).
        """
        both = {taken.gate.job_id, taken.gate.baseline_job_id or taken.gate.job_id}
        with writing(self._engine) as connection:
            locked = {job_id: moves.lock_job(connection, job_id) for job_id in sorted(both)}
            job = locked[taken.gate.job_id]
            if job is None or job["state"] not in FINAL_JOB_STATES or job["attempt"] != taken.job.attempt:
                return False
            if _purged(connection, both, taken.at):
                return False
            values = {
                "state": GateState.DECIDED, "verdict": outcome.verdict, "reason": outcome.reason, "decision": outcome.decision,
                "error": error_row(outcome.error) if outcome.error else None, "decided": UtcNow(), "due": None,
            }  # fmt: skip
            pending = (gates.c.id == taken.gate.id) & (gates.c.state == GateState.PENDING)
            if connection.execute(update(gates).where(pending).values(**values)).rowcount != 1:
                return False
            _show(connection, job, taken.gate.id)
            release_deliveries(connection, taken.gate.id)
            count(connection, f"gates_{outcome.verdict}", 1)
            return True


def _purged(connection: Connection, job_ids: Collection[str], since: datetime) -> bool:
    purges = (events.c.job_id.in_(job_ids)) & (events.c.kind == "purged") & (events.c.at >= since)
    return connection.execute(select(events.c.id).where(purges).limit(1)).first() is not None


def _same_request(connection: Connection, project: str, key: str | None, body_digest: str) -> GateRecord | None:
    """What an earlier request under the same key stored. Raises Conflict where that was another request."""
    if key is None:
        return None
    query = select(gates).where(gates.c.project == project, gates.c.idempotency_key == key)
    row = connection.execute(query).mappings().one_or_none()
    if row is not None and row["body_digest"] != body_digest:
        raise Conflict(f"the idempotency key was used for another request (gate {row['id']})", "use a new key for a new request")
    return _gate(row) if row is not None else None


def _check_pending(connection: Connection, limits: RowMapping) -> None:
    waiting = (gates.c.project == limits["name"]) & (gates.c.state == GateState.PENDING)
    if connection.execute(select(func.count()).select_from(gates).where(waiting)).scalar_one() >= limits["max_queued"]:
        raise QuotaExceeded(f"project {limits['name']!r} has {limits['max_queued']} gates pending", "wait until some are decided")


def _audit(connection: Connection, project: str, job_id: str) -> RowMapping:
    job = moves.lock_job(connection, job_id)
    if job is None or job["project"] != project or job["deleted"] is not None:
        raise NotFound(f"there is no job {job_id!r}", "see `safer-audit list`")
    if not JobKind(job["kind"]).reports:
        raise Conflict(f"job {job_id} is a {job['kind']}, no audit", "a gate judges audits")
    return job


def _insert(connection: Connection, project: str, job: RowMapping, new: NewGate) -> RowMapping:
    given = asdict(new)
    del given["deliveries"]
    row = {
        **given, "policy": dict(new.policy), "id": new_id(), "project": project, "job_id": job["id"], "state": GateState.PENDING,
        "reason": "", "created": UtcNow(), "due": UtcNow() if job["state"] in FINAL_JOB_STATES else None, "attempts": 0,
    }  # fmt: skip
    return connection.execute(insert(gates).values(row).returning(*gates.c)).mappings().one()


def _show(connection: Connection, job: RowMapping, gate_id: str) -> None:
    """The job shows the verdict of its newest gate, of those decided since it ended: this one, and others by the clock."""
    since = (gates.c.id == gate_id) | (gates.c.decided >= job["finished"])
    query = (
        select(*_LISTED)
        .where(since, gates.c.job_id == job["id"], gates.c.state == GateState.DECIDED)
        .order_by(gates.c.created.desc(), gates.c.id.desc())
        .limit(1)
    )
    newest = connection.execute(query).mappings().one()
    verdict = {
        "outcome": newest["verdict"], "gate": newest["id"], "policy": newest["policy_name"],
        "policy_digest": newest["policy_digest"], "baseline": newest["baseline_job_id"],
    }  # fmt: skip
    changed = update(jobs).where(jobs.c.id == job["id"]).values(verdict=verdict, verdict_reason=newest["reason"])
    connection.execute(changed)


def _listing(project: str, query: GateQuery, after: Place | None) -> Select[tuple[object, ...]]:
    created, gate_id = gates.c.created, gates.c.id
    conditions: list[ColumnElement[bool]] = [gates.c.project == project]
    if query.states:
        conditions.append(gates.c.state.in_(query.states))
    if query.verdicts:
        conditions.append(gates.c.verdict.in_(query.verdicts))
    conditions += [gates.c[name] == value for name, value in _named(query).items()]
    if query.created_from is not None:
        conditions.append(created >= query.created_from)
    if query.created_before is not None:
        conditions.append(created < query.created_before)
    if after is not None:
        conditions += [created <= after.created, or_(created < after.created, gate_id < after.id)]
    return select(*_LISTED).where(and_(*conditions)).order_by(created.desc(), gate_id.desc())


def _named(query: GateQuery) -> dict[str, str]:
    given = {"job_id": query.job_id, "policy_name": query.policy}
    return {name: value for name, value in given.items() if value is not None}


def _gate(row: Mapping[Any, Any]) -> GateRecord:
    given = {name: row[name] for name in GateRecord.__dataclass_fields__ if name not in ("state", "error")}
    return GateRecord(state=GateState(row["state"]), error=error_of(row["error"]), **given)
