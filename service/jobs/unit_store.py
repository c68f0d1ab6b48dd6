"""The side of the job store that workers see: lease a unit, renew it, say how it ended.

Every write of a worker names its lease. When the unit has been given to another since, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Engine, RowMapping, case, func, select, update

from service.errors import LeaseLost
from service.infra.settings import Settings
from service.jobs import moves
from service.jobs.clock import UtcNow, utc_after
from service.jobs.database import writing
from service.jobs.job_store import put_inputs
from service.jobs.model import JobError, JobState, Lease, StageState, UnitKind, UnitState
from service.jobs.records import error_row
from service.jobs.requests import Beat, Finished
from service.jobs.tables import artifact_refs, jobs, key_locks, stages, units
from service.jobs.tallies import GPU, artifact_made, gpu_held, gpu_time, run_ended, tally

MAX_RETRY_SECONDS = 3600.0


class UnitLeases:
    """Units as workers see them. Every method is one transaction and may raise Unavailable."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings

    def lease(self, unit_id: int, owner: str) -> Lease | None:
        """Take a unit that a message names; None when there is nothing to do: another has it, or it is over."""
        with writing(self._engine) as connection:
            job_id = connection.execute(select(units.c.job_id).where(units.c.id == unit_id)).scalar()
            job = moves.lock_job(connection, job_id) if job_id is not None else None
            if job is None or job["state"] != JobState.RUNNING or job["cancel_requested"]:
                return None
            if self._spent(connection, unit_id, job):
                return None
            values = {
                "owner": owner, "token": units.c.token + 1, "attempts": units.c.attempts + 1, "started": UtcNow(), "sends": 0,
                "lease_expires": utc_after(self._settings.lease_seconds), "beat_at": UtcNow(),
            }  # fmt: skip
            if not moves.move_units(connection, units.c.id == unit_id, (UnitState.SENT,), UnitState.LEASED, **values):
                return None
            return _leased(connection, unit_id)

    def _spent(self, connection: Connection, unit_id: int, job: RowMapping) -> bool:
        unit = connection.execute(select(units).where(units.c.id == unit_id)).mappings().one()
        if unit["queue"] != GPU or unit["state"] != UnitState.SENT or not _over_budget(job, job["gpu_seconds"]):
            return False
        moves.end_job(connection, job, JobState.FAILED, _budget_error(job))
        return True

    def claim_key(self, lease: Lease, key: str) -> bool:
        """Say which cache key the unit computes; False: another unit computes it, and this one waits for it, unleased.

        Raises LeaseLost.
        """
        with writing(self._engine) as connection:
            held = moves.lock_lease(connection, lease)
            connection.execute(update(stages).where(stages.c.id == lease.stage_id).values(key=key))
            row = {"project": lease.project, "stage": lease.stage, "key": key, "unit_id": lease.unit_id, "token": lease.token}
            statement = moves.inserting(connection)(key_locks).values(row)
            # The update changes nothing: it locks the row that is there, so that its holder cannot give it up in between.
            kept = statement.on_conflict_do_update(
                index_elements=["project", "stage", "key"], set_={"token": key_locks.c.token}
            ).returning(key_locks.c.unit_id)
            holder = connection.execute(kept).scalar_one()
            of_stage = connection.execute(select(units.c.stage_id).where(units.c.id == holder)).scalar_one()
            if of_stage == lease.stage_id:
                connection.execute(update(units).where(units.c.id == lease.unit_id).values(key=key))
                return True
            self._bill(connection, held)
            values = {"owner": None, "lease_expires": None, "key": key}
            moves.move_units(connection, units.c.id == lease.unit_id, (UnitState.LEASED,), UnitState.PARKED, **values)
            moves.add_event(connection, lease.job_id, "stage", lease.stage, {"state": UnitState.PARKED})
            moves.cancel_if_asked(connection, held.job)
            tally(connection, gpu_held(held, lease.stage))
            return False

    def heartbeat(self, lease: Lease) -> Beat:
        """Renew a lease and count the GPU time since the last renewal."""
        with writing(self._engine) as connection:
            try:
                held = moves.lock_lease(connection, lease)
            except LeaseLost:
                return Beat(held=False)
            spent = self._bill(connection, held)
            values = {"lease_expires": utc_after(self._settings.lease_seconds), "beat_at": UtcNow()}
            connection.execute(update(units).where(units.c.id == lease.unit_id).values(values))
            over = held.unit["queue"] == GPU and _over_budget(held.job, spent)
            tally(connection, gpu_held(held, lease.stage))
            return Beat(held=True, cancel=held.job["cancel_requested"], over_budget=over)

    def progress(self, lease: Lease, done: float, total: float, unit: str) -> None:
        """Note how far a unit is; where a stage has parts, its progress is the sum of their shares. Raises LeaseLost."""
        mine = (units.c.id == lease.unit_id) & (units.c.token == lease.token) & (units.c.state == UnitState.LEASED)
        with writing(self._engine) as connection:
            found = connection.execute(update(units).where(mine).values(done=done, total=total))
            if found.rowcount != 1:
                raise LeaseLost(f"unit {lease.unit_id} is no longer held", "write nothing more under this lease")
            if lease.kind is UnitKind.WHOLE:
                _note_progress(connection, lease.stage_id, done, total, unit)
            elif lease.kind is UnitKind.PART:
                _sum_parts(connection, lease.stage_id)

    def split(self, lease: Lease, parts: Sequence[str]) -> None:
        """Replace the `whole` unit by parts that run side by side; the last to finish makes the `join` ready. Raises LeaseLost.

        The stage keeps its cache key. Parts have names, which must differ.
        """
        if lease.kind is not UnitKind.WHOLE or not parts or len(set(parts)) != len(parts):
            raise ValueError("a whole unit is split into one or more parts of different names")
        with writing(self._engine) as connection:
            held = moves.lock_lease(connection, lease)
            self._bill(connection, held)
            _end_lease(connection, lease, UnitState.DONE)
            stage = _stage(connection, lease)
            for name in parts:
                moves.add_unit(connection, held.job, stage, UnitKind.PART, name)
            moves.add_event(connection, lease.job_id, "stage", lease.stage, {"state": "split", "parts": len(parts)})
            _sum_parts(connection, lease.stage_id)
            moves.cancel_if_asked(connection, held.job)
            tally(connection, run_ended(held, lease.stage, "computed"))

    def finish(self, lease: Lease, finished: Finished) -> None:
        """End a unit that is done; with its stage's last unit the stage ends, and with the last stage the job.

        Raises LeaseLost: nothing was changed.
        """
        with writing(self._engine) as connection:
            held = moves.lock_lease(connection, lease)
            self._bill(connection, held)
            _end_lease(connection, lease, UnitState.DONE)
            if lease.kind is UnitKind.PART:
                _part_done(connection, lease, held.job)
            else:
                _stage_done(connection, lease, held.job, finished)
            tally(connection, [*run_ended(held, lease.stage, finished.outcome), *artifact_made(lease.stage, finished)])

    def give_back(self, lease: Lease, delay: float = 0.0) -> None:
        """Hand back a unit that is not done, to be handed out again after so many seconds. Raises LeaseLost."""
        with writing(self._engine) as connection:
            held = moves.lock_lease(connection, lease)
            self._bill(connection, held)
            let_go(connection, held, utc_after(delay), failed=False)
            tally(connection, run_ended(held, lease.stage, "stopped"))

    def fail(self, lease: Lease, error: JobError) -> None:
        """Say that a unit failed: tried again after a pause where that may help, else its job fails. Raises LeaseLost."""
        with writing(self._engine) as connection:
            held = moves.lock_lease(connection, lease)
            self._bill(connection, held)
            self._put_back_or_fail(connection, held, lease, error)
            tally(connection, run_ended(held, lease.stage, "failed", error.code))

    def _put_back_or_fail(self, connection: Connection, held: moves.Held, lease: Lease, error: JobError) -> None:
        if held.job["cancel_requested"]:
            let_go(connection, held, UtcNow(), failed=True)
            return
        failures = held.unit["failures"] + 1
        if not error.retryable or failures >= self._settings.max_failures:
            fail_unit(connection, held, error)
            return
        pause = min(self._settings.retry_seconds * 2.0 ** (failures - 1), MAX_RETRY_SECONDS)
        let_go(connection, held, utc_after(pause), failed=True, error=error)
        told = {"state": "retrying", "error": error_row(error), "in_seconds": pause, "unit": lease.name}
        moves.add_event(connection, lease.job_id, "stage", lease.stage, told)

    def compute_anew(self, lease: Lease, lost: str, error: JobError) -> bool:
        """Go back to the earlier stage, by name, whose artifact the unit misses; when it is done again, this one's turn comes.

        False: there is no such stage, or it was computed anew `max_failures` times; the job has failed with the error. Raises
        LeaseLost.
        """
        with writing(self._engine) as connection:
            held = moves.lock_lease(connection, lease)
            self._bill(connection, held)
            cancelled = bool(held.job["cancel_requested"])
            if cancelled:
                let_go(connection, held, UtcNow(), failed=False)
            most = self._settings.max_failures
            back = cancelled or moves.go_back(connection, held.job, _stage(connection, lease), lost, most)
            if not back:
                fail_unit(connection, held, error)
            tally(connection, run_ended(held, lease.stage, "failed", error.code))
            return back

    def _bill(self, connection: Connection, held: moves.Held) -> float:
        """Add the GPU time since the last renewal to the job; returns its GPU seconds so far."""
        spent = float(held.job["gpu_seconds"]) + gpu_time(held)
        if held.unit["queue"] == GPU:
            connection.execute(update(jobs).where(jobs.c.id == held.job["id"]).values(gpu_seconds=spent))
        return spent


def let_go(
    connection: Connection, held: moves.Held, ready_at: object, *, failed: bool, error: JobError | None = None
) -> None:  # fmt: skip
    """Take a leased unit from its worker: ready again, or over where its job is to be cancelled."""
    where = units.c.id == held.unit["id"]
    values = {"owner": None, "lease_expires": None, "failures": held.unit["failures"] + int(failed)}
    to = UnitState.CANCELLED if held.job["cancel_requested"] else UnitState.READY
    told = {"error": error_row(error)} if error else {}
    moves.move_units(connection, where, (UnitState.LEASED,), to, ready_at=ready_at, **values, **told)
    if held.unit["kind"] == UnitKind.WHOLE:  # where there are parts, the others go on with the stage's key
        moves.release_keys(connection, held.unit["stage_id"])
    moves.cancel_if_asked(connection, held.job)


def fail_unit(connection: Connection, held: moves.Held, error: JobError) -> None:
    """Fail a leased unit and, with it, its job."""
    values = {"lease_expires": None, "failures": held.unit["failures"] + 1, "error": error_row(error)}
    moves.move_units(connection, units.c.id == held.unit["id"], (UnitState.LEASED,), UnitState.FAILED, **values)
    moves.end_job(connection, held.job, JobState.FAILED, error)


def _leased(connection: Connection, unit_id: int) -> Lease:
    query = select(units, stages.c.name.label("stage_name")).join(stages, stages.c.id == units.c.stage_id)
    unit = connection.execute(query.where(units.c.id == unit_id)).mappings().one()
    first = stages.c.started.is_(None) & (stages.c.id == unit["stage_id"])
    if connection.execute(update(stages).where(first).values(started=UtcNow())).rowcount:
        moves.add_event(connection, unit["job_id"], "stage", unit["stage_name"], {"state": "started"})
    if unit["kind"] == UnitKind.WHOLE:  # another worker's pace, and the time in between, say nothing of this one's
        connection.execute(update(stages).where(stages.c.id == unit["stage_id"]).values(pace_since=None))
    return Lease(
        unit_id=unit_id,
        stage_id=unit["stage_id"],
        job_id=unit["job_id"],
        project=unit["project"],
        stage=unit["stage_name"],
        kind=UnitKind(unit["kind"]),
        name=unit["name"],
        token=unit["token"],
        owner=unit["owner"],
        attempt=unit["attempts"],
    )


def _end_lease(connection: Connection, lease: Lease, to: UnitState) -> None:
    moved = moves.move_units(connection, units.c.id == lease.unit_id, (UnitState.LEASED,), to, lease_expires=None)
    assert moved, lease


def _stage(connection: Connection, lease: Lease) -> RowMapping:
    return connection.execute(select(stages).where(stages.c.id == lease.stage_id)).mappings().one()


def _part_done(connection: Connection, lease: Lease, job: RowMapping) -> None:
    _sum_parts(connection, lease.stage_id)
    if moves.cancel_if_asked(connection, job):
        return
    mine = (units.c.stage_id == lease.stage_id) & (units.c.kind == UnitKind.PART)
    left = connection.execute(select(func.count()).select_from(units).where(mine, units.c.state != UnitState.DONE)).scalar_one()
    if left == 0:
        moves.add_unit(connection, job, _stage(connection, lease), UnitKind.JOIN)


def _stage_done(connection: Connection, lease: Lease, job: RowMapping, finished: Finished) -> None:
    cost = dict(finished.cost) if finished.cost is not None else None
    values = {"key": finished.key, "content_digest": finished.content_digest, "cost": cost}
    if finished.key is None:
        del values["key"]
    source = (StageState.OPEN,)
    done = {"finished": UtcNow(), "outcome": finished.outcome}
    before = _stage(connection, lease)
    moved = moves.move_stage(connection, lease.stage_id, source, StageState.DONE, **values, **done)
    assert moved, lease
    if before["content_digest"] not in (None, finished.content_digest):
        moves.undo_following(connection, before)
    moves.release_keys(connection, lease.stage_id)
    if finished.key is not None:
        row = {"project": lease.project, "stage": lease.stage, "key": finished.key, "job_id": lease.job_id}
        statement = moves.inserting(connection)(artifact_refs).values(**row, bytes=finished.bytes, created=UtcNow())
        connection.execute(statement.on_conflict_do_nothing())
    if finished.inputs:
        put_inputs(connection, lease.job_id, finished.inputs)
        known = {**job["inputs"], **finished.inputs}
        connection.execute(update(jobs).where(jobs.c.id == lease.job_id).values(inputs=known))
    if finished.plan is not None:
        connection.execute(update(jobs).where(jobs.c.id == lease.job_id).values(plan=dict(finished.plan)))
    moves.add_event(connection, lease.job_id, "stage", lease.stage, {"state": StageState.DONE, "outcome": finished.outcome})
    following = moves.current_stage(connection, lease.job_id)
    if following is None:
        moves.end_job(connection, job, JobState.SUCCEEDED)
    elif not moves.cancel_if_asked(connection, job):
        moves.open_stage(connection, job, following)


def _sum_parts(connection: Connection, stage_id: int) -> None:
    query = select(units.c.state, units.c.done, units.c.total)
    rows = connection.execute(query.where(units.c.stage_id == stage_id, units.c.kind == UnitKind.PART)).all()
    shares = [1.0 if state == UnitState.DONE else min(done / total, 1.0) if total > 0 else 0.0 for state, done, total in rows]
    _note_progress(connection, stage_id, sum(shares), float(len(rows)), "parts")


def _note_progress(connection: Connection, stage_id: int, done: float, total: float, unit: str) -> None:
    """How far a stage is. Its pace is measured anew where it begins to count otherwise, or again."""
    anew = stages.c.pace_since.is_(None) | (stages.c.unit != unit) | (stages.c.done > done)
    since = {
        "pace_done": case((anew, done), else_=stages.c.pace_done),
        "pace_since": case((anew, UtcNow()), else_=stages.c.pace_since),
    }
    values = {"done": done, "total": total, "unit": unit, **since}
    connection.execute(update(stages).where(stages.c.id == stage_id).values(values))


def _over_budget(job: RowMapping, spent: float) -> bool:
    return job["gpu_seconds_budget"] is not None and spent >= job["gpu_seconds_budget"]


def _budget_error(job: RowMapping) -> JobError:
    message = f"the job has used {job['gpu_seconds']:.0f} of its {job['gpu_seconds_budget']:.0f} GPU seconds"
    return JobError("budget_exhausted", message, "submit it again with a larger budget: what is finished is not computed again")
