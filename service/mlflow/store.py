"""Model versions that MLflow's webhooks asked to be audited: where each stands, and which tags it is to have.

A version is asked for by its webhook (`receive`), once for each delivery. Asked for when it is at its end, it begins a new
round. Of several processes the one that `take`s it works on it, until its claim runs out; a claim that another took since
changes nothing. The tags that a version is to have are owed to MLflow until it has taken them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, RowMapping, delete, func, select, update

from service.jobs import moves
from service.jobs.clock import UtcNow, utc_after
from service.jobs.database import reading, writing
from service.jobs.gate_model import GateState
from service.jobs.model import FINAL_JOB_STATES
from service.jobs.tables import gates, jobs, mlflow_deliveries, mlflow_versions
from service.mlflow.deliveries import VersionEvent

CLAIM_SECONDS = 60.0
"""Who took a version, or its tags, and has said nothing for so long is taken for dead."""
_REMEMBERED_SECONDS = 86400.0
_ROWS = mlflow_versions.c


class VersionState(StrEnum):
    """Where a version stands.

    waiting: its files are to be found and its audit submitted. auditing: until the job ends. judging: until the gate is
    decided. ended: nothing is to be done until it is asked for again.
    """

    WAITING = "waiting"
    AUDITING = "auditing"
    JUDGING = "judging"
    ENDED = "ended"


@dataclass(frozen=True)
class VersionRecord:
    """A version as it is stored.

    Attributes:
        alias: the last that was set on it; None: it was asked for when it was created.
        made: when MLflow made it, in milliseconds since the epoch; tells it from one of the same number of a model that was
            deleted and made anew.
        round: how often it was begun with; names what is submitted in this round.
        request: what is submitted, once that is known.
        token: of the claim; every write names it.
        attempts: how often it was put off in a row.
        tags: those it is to have.
    """

    id: int
    model: str
    version: str
    state: VersionState
    alias: str | None
    made: int | None
    round: int
    request: dict[str, Any] | None
    project: str | None
    job_id: str | None
    gate_id: str | None
    token: int
    attempts: int
    tags: dict[str, str | None]

    @property
    def key(self) -> str:
        """Names this round: what is submitted under it twice is stored once. No request can give it, because of its spaces."""
        return f"mlflow {self.id} {self.round}"


@dataclass(frozen=True)
class OwedTags:
    """Tags that a version, made at that time, is to have (None: is not to have), and the number of the wish."""

    id: int
    model: str
    version: str
    made: int | None
    tags: dict[str, str | None]
    tags_number: int
    tags_attempts: int


class VersionStore:
    """Model versions of the registry. Safe for threads; every method is one or more transactions and may raise Unavailable."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def receive(self, delivery: str, event: VersionEvent) -> bool:
        """Store what a delivery asks for; False where it was here before. When this returns, nothing of it can be lost."""
        with writing(self._engine) as connection:
            old = mlflow_deliveries.c.at < utc_after(-_REMEMBERED_SECONDS)
            connection.execute(delete(mlflow_deliveries).where(old))
            insert = moves.inserting(connection)
            taken = insert(mlflow_deliveries).values(id=delivery, at=UtcNow()).on_conflict_do_nothing(index_elements=["id"])
            if connection.execute(taken.returning(mlflow_deliveries.c.id)).first() is None:
                return False
            row = {
                "model": event.model, "version": event.version, "state": VersionState.ENDED, "round": 0, "token": 0,
                "attempts": 0, "tags": {}, "tags_number": 0, "tags_attempts": 0,
            }  # fmt: skip
            made = insert(mlflow_versions).values(row).on_conflict_do_nothing(index_elements=["model", "version"])
            connection.execute(made)
            self._begin(connection, event)
            return True

    def _begin(self, connection: Connection, event: VersionEvent) -> None:
        mine = (_ROWS.model == event.model) & (_ROWS.version == event.version)
        begun = {
            "state": VersionState.WAITING, "round": _ROWS.round + 1, "request": None, "due": UtcNow(), "attempts": 0,
            "alias": event.alias,
        }  # fmt: skip
        connection.execute(update(mlflow_versions).where(mine, _ROWS.state == VersionState.ENDED).values(**begun))

    def take(self) -> VersionRecord | None:
        """A version that something is to be done about now, which nobody else is given for a while; None where there is none."""
        due = (_ROWS.due <= UtcNow()) & _something_to_do()
        with reading(self._engine) as connection:
            found = connection.execute(select(_ROWS.id).where(due).order_by(_ROWS.due).limit(20)).scalars().all()
        for each in found:
            with writing(self._engine) as connection:
                claim = {"due": utc_after(CLAIM_SECONDS), "token": _ROWS.token + 1}
                mine = update(mlflow_versions).where(_ROWS.id == each, due).values(**claim).returning(*_ROWS)
                row = connection.execute(mine).mappings().one_or_none()
            if row is not None:
                return _record(row)
        return None

    def renew(self, held: VersionRecord) -> bool:
        """Go on holding it; False where another took it."""
        return self._change(held, due=utc_after(CLAIM_SECONDS))

    def put_off(self, held: VersionRecord, seconds: float, tags: Mapping[str, str | None] | None = None) -> bool:
        """Nothing can be done now; again in so many seconds."""
        return self._change(held, tags, due=utc_after(seconds), attempts=_ROWS.attempts + 1)

    def move(
        self, held: VersionRecord, to: VersionState, tags: Mapping[str, str | None] | None = None, **values: Any
    ) -> bool:  # fmt: skip
        """It stands elsewhere now, and is to have these tags; False, and nothing is changed, where another took it."""
        return self._change(held, tags, state=to, due=UtcNow(), attempts=0, **values)

    def keep(self, held: VersionRecord, tags: Mapping[str, str | None] | None = None, **values: Any) -> bool:
        """Note what was found out of it, without moving it; False where another took it."""
        return self._change(held, tags, **values)

    def _change(self, held: VersionRecord, tags: Mapping[str, str | None] | None = None, **values: Any) -> bool:
        if tags is not None:
            owed = {"tags": dict(tags), "tags_number": _ROWS.tags_number + 1, "tags_attempts": 0}
            values |= owed | {"tags_due": func.coalesce(_ROWS.tags_due, UtcNow())}
        mine = (_ROWS.id == held.id) & (_ROWS.token == held.token)
        with writing(self._engine) as connection:
            return connection.execute(update(mlflow_versions).where(mine).values(**values)).rowcount == 1

    def begin_anew(self, held: VersionRecord) -> bool:
        """Another version has its name and number by now: that one is asked for, in a new round."""
        forgotten = {"request": None, "job_id": None, "gate_id": None}
        return self.move(held, VersionState.WAITING, round=_ROWS.round + 1, **forgotten)

    def find(self, model: str, version: str) -> VersionRecord | None:
        """One version; None where it was never asked for."""
        query = select(mlflow_versions).where(_ROWS.model == model, _ROWS.version == version)
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return _record(row) if row is not None else None

    def take_tags(self) -> OwedTags | None:
        """Tags to write now, which nobody else is given for a while; None where none are owed."""
        due = _ROWS.tags_due <= UtcNow()
        with reading(self._engine) as connection:
            found = connection.execute(select(_ROWS.id).where(due).order_by(_ROWS.tags_due).limit(20)).scalars().all()
        for each in found:
            with writing(self._engine) as connection:
                claim = {"tags_due": utc_after(CLAIM_SECONDS), "tags_attempts": _ROWS.tags_attempts + 1}
                mine = update(mlflow_versions).where(_ROWS.id == each, due).values(**claim).returning(*_ROWS)
                row = connection.execute(mine).mappings().one_or_none()
            if row is not None:
                return OwedTags(**{name: row[name] for name in OwedTags.__dataclass_fields__})
        return None

    def settle_tags(self, owed: OwedTags) -> None:
        """The tags are written; where others were wished for meanwhile, those are due now."""
        mine, same = _ROWS.id == owed.id, _ROWS.tags_number == owed.tags_number
        with writing(self._engine) as connection:
            connection.execute(update(mlflow_versions).where(mine).values(tags_due=UtcNow()))
            connection.execute(update(mlflow_versions).where(mine, same).values(tags_due=None, tags_attempts=0))

    def put_off_tags(self, owed: OwedTags, seconds: float | None) -> None:
        """The tags cannot be written now: again in so many seconds; None: never."""
        mine = _ROWS.id == owed.id
        mine = mine if seconds is not None else mine & (_ROWS.tags_number == owed.tags_number)
        again = utc_after(seconds) if seconds is not None else None
        with writing(self._engine) as connection:
            connection.execute(update(mlflow_versions).where(mine).values(tags_due=again))


def _something_to_do() -> ColumnElement[bool]:
    """What waits; whose job runs no more; whose gate is pending no more."""
    runs = select(jobs.c.id).where(jobs.c.id == _ROWS.job_id, jobs.c.deleted.is_(None), jobs.c.state.not_in(FINAL_JOB_STATES))
    pends = select(gates.c.id).where(gates.c.id == _ROWS.gate_id, gates.c.state == GateState.PENDING)
    return (
        (_ROWS.state == VersionState.WAITING)
        | ((_ROWS.state == VersionState.AUDITING) & ~runs.exists())
        | ((_ROWS.state == VersionState.JUDGING) & ~pends.exists())
    )


def _record(row: RowMapping) -> VersionRecord:
    given = {name: row[name] for name in VersionRecord.__dataclass_fields__ if name != "state"}
    return VersionRecord(state=VersionState(row["state"]), **given)
