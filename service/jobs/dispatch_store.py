"""The side of the job store that the dispatcher sees: what to hand out next, and what was lost on the way."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Engine, case, delete, func, select, update

from service.infra.settings import Settings
from service.jobs import moves
from service.jobs.clock import UtcNow, utc_after
from service.jobs.database import reading, writing
from service.jobs.facts import count
from service.jobs.fair_order import Candidate, Shares, fair_order
from service.jobs.model import QUEUES, JobError, JobState, StageState, UnitState
from service.jobs.requests import Message, Reconciled
from service.jobs.tables import jobs, key_locks, leaders, projects, stages, units
from service.jobs.tallies import LOST, run_ended, tally
from service.jobs.unit_store import fail_unit, let_go

_ROUND = 500
_LONGEST_RESEND = 4
_DIED = "worker_died"


class Dispatch:
    """Units as the dispatcher sees them. Every method may raise Unavailable."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings

    def ready_units(self, queue: str, limit: int) -> tuple[int, ...]:
        """Ids of the units to hand out next, in fair order, at most `limit`."""
        if limit <= 0:
            return ()
        with reading(self._engine) as connection:
            found = _candidates(connection, queue, limit)
            return fair_order(found, _shares(connection, queue, found), limit) if found else ()

    def waiting_units(self, queue: str, limit: int) -> tuple[int, ...]:
        """Ids of the units that a worker may take by itself: those to hand out next, then those whose message is under way."""
        sent = (units.c.queue == queue) & (units.c.state == UnitState.SENT)
        query = select(units.c.id).where(sent).order_by(units.c.priority.desc(), units.c.sent_at).limit(limit)
        with reading(self._engine) as connection:
            under_way = tuple(connection.execute(query).scalars())
        return (*self.ready_units(queue, limit), *under_way)[:limit]

    def unheard_units(self, queue: str, seconds: float) -> tuple[int, ...]:
        """Ids of units whose message was sent within the last so many seconds, but not just now or not for the first time,
        and that nobody took.
        """
        late = (units.c.sends > 1) | (units.c.sent_at < utc_after(-self._settings.resend_seconds))
        sent = (units.c.queue == queue) & (units.c.state == UnitState.SENT) & (units.c.sent_at >= utc_after(-seconds))
        with reading(self._engine) as connection:
            return tuple(connection.execute(select(units.c.id).where(sent, late).limit(_ROUND)).scalars())

    def mark_sent(self, unit_id: int) -> bool:
        """Note that a unit's message is about to be sent; a queued job starts with its first.

        False: the unit is not ready (any more), or its project has as many jobs running as it may.
        """
        with writing(self._engine) as connection:
            unit = connection.execute(select(units.c.job_id, units.c.project).where(units.c.id == unit_id)).one_or_none()
            limits = moves.lock_project(connection, unit.project) if unit else None
            job = moves.lock_job(connection, unit.job_id) if unit else None
            if job is None or limits is None or job["cancel_requested"]:
                return False
            if job["state"] == JobState.QUEUED and _running(connection, job["project"]) >= limits["max_running"]:
                return False
            due = (units.c.id == unit_id) & (units.c.ready_at <= UtcNow())
            if not moves.move_units(connection, due, (UnitState.READY,), UnitState.SENT, sent_at=UtcNow(), sends=1):
                return False
            connection.execute(update(projects).where(projects.c.name == job["project"]).values(served=UtcNow()))
            if moves.move_job(connection, job["id"], (JobState.QUEUED,), JobState.RUNNING, started=UtcNow()):
                moves.add_event(connection, job["id"], "job", None, {"state": JobState.RUNNING})
            return True

    def reconcile(self) -> Reconciled:
        """Find what was lost: messages nobody took, workers that are gone, keys that nobody computes any more."""
        expired, poisoned = self._expire()
        released = self._unpark_orphans()
        return Reconciled(self._resend(), expired, poisoned, released)

    def _expire(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        late = (units.c.state == UnitState.LEASED) & (units.c.lease_expires < UtcNow())
        with reading(self._engine) as connection:
            found = connection.execute(select(units.c.id, units.c.job_id).where(late).limit(_ROUND)).all()
        expired: list[int] = []
        poisoned: list[int] = []
        for unit_id, job_id in found:
            with writing(self._engine) as connection:
                job = moves.lock_job(connection, job_id)
                query = select(units, UtcNow().label("now")).where(late, units.c.id == unit_id)
                unit = connection.execute(query).mappings().one_or_none()
                if job is None or unit is None:
                    continue
                poison = _take_away(connection, moves.Held(job, unit), self._settings.max_failures)
                (poisoned if poison else expired).append(unit_id)
        return tuple(expired), tuple(poisoned)

    def _resend(self) -> tuple[Message, ...]:
        # A message that waits in a long queue is not lost: each further one is sent after a longer pause.
        pause = self._settings.resend_seconds
        late = case(
            *((units.c.sends <= sends, units.c.sent_at < utc_after(-pause * sends)) for sends in range(1, _LONGEST_RESEND)),
            else_=units.c.sent_at < utc_after(-pause * _LONGEST_RESEND),
        )  # fmt: skip
        # What another transaction is changing is left to it: waiting for rows in no order could be waiting in a circle.
        lost = select(units.c.id).where(units.c.state == UnitState.SENT, late).limit(_ROUND).with_for_update(skip_locked=True)
        with writing(self._engine) as connection:
            values = {"sent_at": UtcNow(), "sends": units.c.sends + 1}
            again = update(units).where(units.c.id.in_(lost), units.c.state == UnitState.SENT).values(values)
            found = connection.execute(again.returning(units.c.id, units.c.queue))
            messages = tuple(Message(unit_id, queue) for unit_id, queue in found)
            for queue in QUEUES:
                count(connection, f"messages_resent_{queue}", sum(message.queue == queue for message in messages))
            return messages

    def _unpark_orphans(self) -> tuple[int, ...]:
        """Keys are given up in the transaction that ends their unit, so that nothing is found here; it costs little to look."""
        holder = units.alias()
        live = select(holder.c.id).join(stages, stages.c.id == holder.c.stage_id).where(stages.c.state == StageState.OPEN)
        with writing(self._engine) as connection:
            connection.execute(delete(key_locks).where(key_locks.c.unit_id.not_in(live)))
            locked = (
                select(key_locks.c.unit_id)
                .join(stages, stages.c.id == units.c.stage_id)
                .where(key_locks.c.project == units.c.project, key_locks.c.key == units.c.key, key_locks.c.stage == stages.c.name)
                .correlate(units)
                .exists()
            )
            found = select(units.c.id).where(units.c.state == UnitState.PARKED, ~locked).with_for_update(skip_locked=True)
            orphans = connection.execute(found).scalars().all()
            return moves.move_units(connection, units.c.id.in_(orphans), (UnitState.PARKED,), UnitState.READY, ready_at=UtcNow())

    def lead(self, name: str, holder: str, seconds: float) -> bool:
        """Become or stay the leader for so many seconds; False while another is."""
        row = {"name": name, "holder": holder, "token": 1, "expires": utc_after(seconds)}
        with writing(self._engine) as connection:
            statement = moves.inserting(connection)(leaders).values(row)
            taken = statement.on_conflict_do_update(
                index_elements=["name"],
                set_={
                    "holder": holder,
                    "expires": utc_after(seconds),
                    "token": leaders.c.token + case((leaders.c.holder == holder, 0), else_=1),
                },
                where=(leaders.c.holder == holder) | (leaders.c.expires < UtcNow()),
            )
            return connection.execute(taken.returning(leaders.c.name)).first() is not None

    def resign(self, name: str, holder: str) -> None:
        """Stop leading, so that another may at once."""
        mine = (leaders.c.name == name) & (leaders.c.holder == holder)
        with writing(self._engine) as connection:
            connection.execute(update(leaders).where(mine).values(expires=utc_after(-1.0)))


def _candidates(connection: Connection, queue: str, limit: int) -> tuple[Candidate, ...]:
    """The first units of every project, apart for jobs that run and jobs that would start."""
    starts = (jobs.c.state == JobState.QUEUED).label("starts")
    order = (units.c.priority.desc(), jobs.c.created, units.c.id)
    place = func.row_number().over(partition_by=(units.c.project, starts), order_by=order).label("place")
    ready = (units.c.queue == queue) & (units.c.state == UnitState.READY) & (units.c.ready_at <= UtcNow())
    columns = (units.c.id, units.c.job_id, units.c.project, units.c.priority, jobs.c.created, starts, place)
    of_jobs = select(*columns).join(jobs, jobs.c.id == units.c.job_id).where(ready, jobs.c.cancel_requested.is_(False)).subquery()
    rows = connection.execute(select(of_jobs).where(of_jobs.c.place <= limit)).all()
    return tuple(
        Candidate(row.id, row.job_id, row.project, row.priority, (row.created.isoformat(), row.id), bool(row.starts))
        for row in rows
    )


def _shares(connection: Connection, queue: str, found: Sequence[Candidate]) -> Shares:
    names = {candidate.project for candidate in found}
    handed_out = (units.c.queue == queue) & units.c.state.in_((UnitState.SENT, UnitState.LEASED))
    active = connection.execute(
        select(units.c.project, func.count().label("units")).where(handed_out).group_by(units.c.project)
    ).all()
    limits = connection.execute(select(projects).where(projects.c.name.in_(names))).mappings().all()
    room = {row["name"]: row["max_running"] - _running(connection, row["name"]) for row in limits}
    served = {row["name"]: row["served"].timestamp() for row in limits if row["served"] is not None}
    return Shares({row.project: row.units for row in active}, room, served)


def _running(connection: Connection, project: str) -> int:
    query = select(func.count()).select_from(jobs).where(jobs.c.project == project, jobs.c.state == JobState.RUNNING)
    return int(connection.execute(query).scalar_one())


def _take_away(connection: Connection, held: moves.Held, max_failures: int) -> bool:
    """Take a unit from a worker that is gone; says whether it has lost too many."""
    lost = held.unit["failures"] + 1
    stage = connection.execute(select(stages.c.name).where(stages.c.id == held.unit["stage_id"])).scalar_one()
    told = {"state": "expired", "unit": held.unit["name"], "owner": held.unit["owner"], "lost": lost}
    moves.add_event(connection, held.job["id"], "stage", stage, told)
    poison = lost >= max_failures and not held.job["cancel_requested"]
    if poison:
        hint = "the worker's log says why (often too little memory); retry when that is mended"
        fail_unit(connection, held, JobError(_DIED, f"stage {stage} lost its worker {lost} times", hint))
    else:
        let_go(connection, held, UtcNow(), failed=True)
    count(connection, "lease_expired", 1)
    tally(connection, run_ended(held, stage, LOST, _DIED if poison else None))
    return poison
